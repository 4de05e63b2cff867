"""Text as batches of packed rows: corpus, tokenizer, packing, loader.

The only package that imports grain or tensorflow-datasets.
"""

import dataclasses
import functools
from typing import Literal

from research.data import text
from research.data import tokenizer as tokenizers
from research.data.loader import batches
from research.data.packing import PackedDocuments
from research.errors import check

__all__ = ["PackedDocuments", "TextConfig", "TextData", "batches", "load"]


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """Which text, and how it becomes tokens."""

  source: str = "stdlib"  # a name in text.SOURCES, or name:argument, as files:DIR
  tokenizer: Literal["bytes", "bpe"] = "bytes"
  bpe_vocab: int = 4096  # 256 bytes, the merges, and the end of a document
  max_bad_records: int = 10  # skipped and reported; one more is an error

  def __post_init__(self):
    check(self.tokenizer in ("bytes", "bpe"), "tokenizer", self.tokenizer, "choose bytes or bpe")
    check(self.bpe_vocab >= 257, "bpe_vocab", self.bpe_vocab, "use at least 257: 256 bytes and the end of a document")
    check(self.max_bad_records >= 0, "max_bad_records", self.max_bad_records, "use 0 or more")


@dataclasses.dataclass(frozen=True)
class TextData:
  """A corpus ready for `batches`, one packed source a split."""

  tokenizer: tokenizers.Tokenizer
  packed: dict[str, PackedDocuments]
  corpus_info: dict

  def split(self, name: str) -> PackedDocuments:
    """The rows of `train` or `validation`."""
    return self.packed[name]

  def info(self) -> dict:
    """For the manifest: what was read (`text.info`), and for each split its rows and tokens.

    `tokens` counts the targets, ends of documents included, so that
    nats per token / ln 2 / `bytes_per_token` of a split is its bits per byte.
    """
    tokens = {split: source.positions for split, source in self.packed.items()}
    return self.corpus_info | {
      "tokenizer": {"name": self.tokenizer.name, "vocab": self.tokenizer.vocab, "sha256": self.tokenizer.sha256},
      "rows": {split: len(source) for split, source in self.packed.items()},
      "tokens": tokens,
      "bytes_per_token": {split: self.corpus_info["bytes"][split] / n for split, n in tokens.items()},
    }


def load(cfg: TextConfig, length: int, seed: int) -> TextData:
  """The corpus of `cfg`, tokenized and packed into rows of `length`.

  `seed` orders the train documents; validation rows are the same for every seed, so
  that their losses compare.

  Raises UserError (`length`, or a field of `cfg`) for a mistake told by `text.read`,
  a length below 2, or too little text for one train row.
  """
  check(length >= 2, "length", length, "use rows of at least 2 tokens")
  tokenizer, tokenized, corpus_info = _tokenize(cfg)

  def pack(split: str, order: int) -> PackedDocuments:
    documents = sorted(tokenized[split], key=lambda d: text.name_hash(f"{order}/{d[0]}"))
    return PackedDocuments([ids for _, ids in documents], length, tokenizer.eod, drop_last=split == "train")

  packed = {"train": pack("train", seed), "validation": pack("validation", 0)}
  n = packed["train"].positions
  check(len(packed["train"]) > 0, "source", cfg.source, f"has {n} train tokens, too few for one row of {length}")
  return TextData(tokenizer, packed, corpus_info)


@functools.lru_cache(maxsize=2)
def _tokenize(cfg: TextConfig):
  """(tokenizer, {split: [(name, ids), ...]}, info): once for all seeds and arms of a command."""
  corpora = text.read(cfg.source, cfg.max_bad_records)
  tokenizer = tokenizers.bpe(corpora["train"], cfg.bpe_vocab) if cfg.tokenizer == "bpe" else tokenizers.byte_level()
  tokenized = {}
  for split, corpus in corpora.items():
    names, contents = zip(*corpus.documents, strict=True)
    tokenized[split] = list(zip(names, tokenizer.encode_batch(contents), strict=True))
  return tokenizer, tokenized, text.info(cfg.source, corpora)
