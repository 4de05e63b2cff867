"""Lossless tokenizers over UTF-8 bytes: the bytes themselves, or byte-level BPE."""

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import json
import logging
import os
from pathlib import Path
import tempfile

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from research.data.text import Corpus

_log = logging.getLogger(__name__)
_BATCH = 256  # documents encoded at once: bounds the memory that their encodings take


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Ids in [0, vocab); the last one, `eod`, ends a document and stands for no text."""

  name: str
  vocab: int
  sha256: str  # of everything that decides what an id means
  pieces: tuple[bytes, ...]  # what each id stands for
  encode_batch: Callable[[Sequence[bytes]], list[np.ndarray]]  # UTF-8 documents -> int32 ids, without eod

  @property
  def eod(self) -> int:
    return self.vocab - 1

  def encode(self, document: bytes) -> np.ndarray:
    """int32 [tokens] of a UTF-8 document, without `eod`."""
    return self.encode_batch([document])[0]

  def decode(self, ids) -> bytes:
    """The bytes that `ids` stand for; `eod` and ids that were never learnt stand for none."""
    return b"".join(self.pieces[i] for i in ids)


def byte_level() -> Tokenizer:
  """One id a byte; 0xFF, which UTF-8 never uses, is `eod`."""
  encode = lambda documents: [np.frombuffer(d, np.uint8).astype(np.int32) for d in documents]
  pieces = (*(bytes([b]) for b in range(255)), b"")
  return Tokenizer("bytes", 256, hashlib.sha256(b"bytes").hexdigest(), pieces, encode)


def bpe(corpus: Corpus, vocab: int) -> Tokenizer:
  """Byte-level BPE (Sennrich et al., 2016; Radford et al., 2019) learnt from `corpus`.

  `vocab` counts 256 bytes, the merges and `eod`. A small corpus may have fewer merges;
  `vocab` stays what was asked for, so that the corpus does not decide a model's shape.
  What was learnt is kept in `$REPRISE_CACHE` (default `~/.cache/reprise`).
  """
  key = hashlib.sha256(f"{corpus.sha256} {vocab} {tokenizers.__version__}".encode()).hexdigest()
  path = _cache_dir() / f"bpe-{key[:32]}.json"
  model = _cached(path)
  if model is None:
    model = _train(corpus, vocab)
    _keep(path, model)
  learnt = tokenizers.Tokenizer.from_str(model)

  def encode_batch(documents: Sequence[bytes]) -> list[np.ndarray]:
    ids = []
    for i in range(0, len(documents), _BATCH):
      texts = [d.decode("utf-8") for d in documents[i : i + _BATCH]]
      ids += [np.array(e.ids, np.int32) for e in learnt.encode_batch_fast(texts, add_special_tokens=False)]
    return ids

  to_byte = {char: byte for byte, char in enumerate(_alphabet())}
  pieces = [b""] * vocab
  for piece, i in learnt.get_vocab().items():
    pieces[i] = bytes(to_byte[char] for char in piece)
  sha256 = hashlib.sha256(f"{vocab} {model}".encode()).hexdigest()
  return Tokenizer("bpe", vocab, sha256, tuple(pieces), encode_batch)


def _train(corpus: Corpus, vocab: int) -> str:
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  # eod is not among the learnt tokens: the library would find a special token's name in
  # a document's own text, and a document could end itself.
  trainer = trainers.BpeTrainer(vocab_size=vocab - 1, initial_alphabet=_alphabet(), show_progress=False)
  tokenizer.train_from_iterator((data.decode("utf-8") for _, data in corpus.documents), trainer)
  return tokenizer.to_str()


def _alphabet() -> list[str]:
  """The character by which byte-level BPE writes each byte: printable ones stand for themselves."""
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = iter(range(256, 512))
  return [chr(b if b in printable else next(others)) for b in range(256)]


def _cache_dir() -> Path:
  return Path(os.environ.get("REPRISE_CACHE") or "~/.cache/reprise").expanduser()


def _cached(path: Path) -> str | None:
  """The model kept at `path`, or None if there is none or it is not what was written."""
  try:
    entry = json.loads(path.read_text())
    if entry["sha256"] == hashlib.sha256(entry["model"].encode()).hexdigest():
      return entry["model"]
  except OSError:
    return None
  except (ValueError, KeyError, TypeError, AttributeError):
    pass
  _log.warning("%s is damaged; learning the tokenizer again", path)
  return None


def _keep(path: Path, model: str) -> None:
  """Writes the model whole or not at all: other processes may be reading."""
  entry = json.dumps({"sha256": hashlib.sha256(model.encode()).hexdigest(), "model": model})
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as f:
      f.write(entry)
    os.replace(f.name, path)
  except OSError as e:
    _log.warning("the tokenizer is not kept: %s", e)
