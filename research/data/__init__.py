"""Text as batches of packed rows: sources, tokenizers, packing, shards, mixtures, loader.

The only package that imports grain or tensorflow-datasets. docs/data.md has the syntax of
every source.
"""

import dataclasses
import functools
import hashlib

from research.data import preferences, shards, sources, text
from research.data import tokenizer as tokenizers
from research.data.loader import batches, same_batch, training_rows
from research.data.mixture import Mixture
from research.data.packing import PackedDocuments, abstract_rows
from research.data.preferences import PreferenceConfig
from research.data.tokenizer import Tokenizer
from research.errors import check

__all__ = ["Mixture", "PackedDocuments", "PreferenceConfig", "TextConfig", "TextData", "Tokenizer"]
__all__ += ["abstract_rows", "batches", "load", "load_tokenizer", "same_batch", "training_rows"]


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """Which text, and how it becomes tokens."""

  source: tuple[str, ...] = ("stdlib",)  # each stdlib, files:DIR, tfds:NAME or shards:DIR
  weights: tuple[float, ...] = ()  # of several sources: their shares of the training rows
  tokenizer: str = "bytes"  # bytes, bpe, or hf:PATH/tokenizer.json
  bpe_vocab: int = 4096  # 256 bytes, the merges, and the end of a document
  max_bad_records: int = 10  # of a source, skipped and reported; one more is an error

  def __post_init__(self):
    for name in ("source", "weights"):
      value = getattr(self, name)
      check(isinstance(value, tuple), name, value, f"must be a tuple, as in {name} = ({value!r},)")
    n = len(self.source)
    check(n > 0 and all(self.source), "source", self.source, "name a source, as in source=stdlib")
    check(len(set(self.source)) == n, "source", self.source, "name each source once")
    check(n == 1 or self.weights, "weights", "()", f"give each of the {n} sources a weight, as in weights=0.7,0.3")
    check(len(self.weights) in (0, n), "weights", self.weights, f"give one weight for each source: {n}")
    check(all(w > 0 for w in self.weights), "weights", self.weights, "use positive numbers")
    known = self.tokenizer in ("bytes", "bpe") or self.tokenizer.startswith("hf:")
    check(known, "tokenizer", self.tokenizer, "choose bytes, bpe or hf:PATH/tokenizer.json")
    check(self.bpe_vocab >= 257, "bpe_vocab", self.bpe_vocab, "use at least 257: 256 bytes and the end of a document")
    check(self.max_bad_records >= 0, "max_bad_records", self.max_bad_records, "use 0 or more")


@dataclasses.dataclass(frozen=True)
class TextData:
  """Sources ready for `batches`: rows by split, of all together and of each."""

  tokenizer: Tokenizer
  weights: tuple[float, ...]
  parts: tuple[dict[str, PackedDocuments], ...]  # {split: rows} of each source
  read: tuple[dict, ...]  # what is known of each source, as from `text.info`

  def split(self, name: str) -> PackedDocuments | Mixture:
    """The rows of `train` or `validation`: of several sources, one after the other until `batches` mixes them."""
    rows = [part[name] for part in self.parts]
    return rows[0] if len(rows) == 1 else Mixture(rows, self.weights)

  def info(self) -> dict:
    """For the manifest: what was read, and for each split its rows and tokens; `sources` has the same of each.

    `tokens` counts the targets, ends of documents included, so that
    nats per token / ln 2 / `bytes_per_token` of a split is its bits per byte.
    """
    of_each = [
      _counts(read, {split: [rows] for split, rows in part.items()})
      for read, part in zip(self.read, self.parts, strict=True)
    ]
    about = {"tokenizer": {"name": self.tokenizer.name, "vocab": self.tokenizer.vocab, "sha256": self.tokenizer.sha256}}
    if len(of_each) == 1:
      return of_each[0] | about
    whole = {"source": [read["source"] for read in self.read], "weights": list(self.weights), "sources": of_each}
    for name in ("documents", "bytes"):
      whole[name] = {split: sum(read[name][split] for read in self.read) for split in text.SPLITS}
    whole["sha256"] = {split: _sha256(*(read["sha256"][split] for read in self.read)) for split in text.SPLITS}
    whole["bad_records"] = [name for read in self.read for name in read["bad_records"]]
    return _counts(whole, {split: [part[split] for part in self.parts] for split in text.SPLITS}) | about


def load(cfg: TextConfig, length: int, seed: int) -> TextData:
  """The sources of `cfg`, tokenized and packed into rows of `length`.

  `seed` orders the train documents that are tokenized here; those of shards stay in the
  order written. Validation rows are the same for every seed, so that their losses compare.

  Raises UserError (`length`, or a field of `cfg`) for a mistake told by `text.read` or
  `shards.manifest`, a length below 2, or too little text for one train row.
  """
  check(length >= 2, "length", length, "use rows of at least 2 tokens")
  tokenizer, tokenized, read = _tokenize(cfg)

  def pack(source: str, documents: dict | None, split: str, order: int) -> PackedDocuments:
    if documents is None:
      return shards.PackedShards(source, split, length, drop_last=split == "train")
    ordered = sorted(documents[split], key=lambda d: text.name_hash(f"{order}/{d[0]}"))
    names, ids = zip(*ordered, strict=True) if ordered else ((), ())
    return PackedDocuments(ids, length, tokenizer.eod, drop_last=split == "train", names=names)

  parts = []
  for source, documents in zip(cfg.source, tokenized, strict=True):
    parts.append(
      {"train": pack(source, documents, "train", seed), "validation": pack(source, documents, "validation", 0)}
    )
    n = parts[-1]["train"].positions
    check(len(parts[-1]["train"]) > 0, "source", source, f"has {n} train tokens, too few for one row of {length}")
  return TextData(tokenizer, cfg.weights, tuple(parts), read)


def load_tokenizer(cfg: TextConfig | PreferenceConfig) -> Tokenizer:
  """The tokenizer of `cfg` alone: at once, but for a `bpe` without shards, whose corpus is read to know it."""
  if isinstance(cfg, PreferenceConfig):
    return preferences.load_tokenizer(cfg)
  if cfg.tokenizer == "bpe" and not _in_shards(cfg):
    return _tokenizer(cfg, [text.read(source, cfg.max_bad_records) for source in cfg.source])
  return _tokenizer(cfg, [])


@functools.lru_cache(maxsize=2)
def _tokenize(cfg: TextConfig):
  """(tokenizer, [{split: [(name, ids), ...]} or None for shards], [info]): once for all seeds and arms of a command."""
  found = _in_shards(cfg)
  corpora = {source: text.read(source, cfg.max_bad_records) for source in cfg.source if source not in found}
  tokenizer = _tokenizer(cfg, list(corpora.values()))
  tokenized, read = [], []
  for source in cfg.source:
    if source in found:
      tokenized.append(None)
      read.append(shards.info(source))
      continue
    ids = {}
    for split, corpus in corpora[source].items():
      names, contents = zip(*corpus.documents, strict=True)
      ids[split] = list(zip(names, tokenizer.encode_batch(contents), strict=True))
    tokenized.append(ids)
    read.append(text.info(source, corpora[source]))
  return tokenizer, tokenized, tuple(read)


def _tokenizer(cfg: TextConfig, corpora: list[dict[str, text.Corpus]]) -> Tokenizer:
  """That of `cfg`; `bpe` is the one of its shards, or else learnt from the train documents of all sources."""
  written = _in_shards(cfg)
  if cfg.tokenizer == "bytes":
    tokenizer = tokenizers.byte_level()
  elif cfg.tokenizer.startswith("hf:"):
    tokenizer = tokenizers.hugging_face(cfg.tokenizer.removeprefix("hf:"))
  elif bpe := [source for source, about in written.items() if about["name"] == "bpe"]:
    tokenizer = shards.tokenizer(bpe[0], written[bpe[0]])
    vocab = tokenizer.vocab
    check(vocab == cfg.bpe_vocab, "bpe_vocab", cfg.bpe_vocab, f"{bpe[0]} was written with bpe of {vocab} ids")
  elif len(corpora) == 1:
    tokenizer = tokenizers.bpe(corpora[0]["train"], cfg.bpe_vocab)
  elif corpora:
    documents = [(f"{i} {name}", data) for i, c in enumerate(corpora) for name, data in c["train"].documents]
    tokenizer = tokenizers.bpe(text.corpus(documents), cfg.bpe_vocab)
  for source, about in written.items():
    same = cfg.tokenizer.partition(":")[0] == about["name"] and tokenizer.sha256 == about["sha256"]
    fix = f"{source} was written with {about['name']} of {about['vocab']} ids, sha256 {about['sha256'][:12]}; use that"
    check(same, "tokenizer", cfg.tokenizer, fix)
  return tokenizer


def _in_shards(cfg: TextConfig) -> dict[str, dict]:
  """{source: its tokenizer} of the sources that are shards. Raises UserError for those that are not whole."""
  found = [source for source in cfg.source if sources.parse(source)[0] == "shards"]
  return {source: shards.manifest(source)["tokenizer"] for source in found}


def _counts(read: dict, rows: dict[str, list[PackedDocuments]]) -> dict:
  tokens = {split: sum(r.positions for r in of) for split, of in rows.items()}
  return read | {
    "rows": {split: sum(map(len, of)) for split, of in rows.items()},
    "tokens": tokens,
    "bytes_per_token": {split: read["bytes"][split] / n for split, n in tokens.items()},
  }


def _sha256(*hashes: str) -> str:
  return hashlib.sha256(" ".join(hashes).encode()).hexdigest()
