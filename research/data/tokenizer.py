"""Tokenizers over UTF-8 bytes: the bytes themselves, byte-level BPE, or a file of Hugging Face's library."""

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

from research import paths
from research.data.text import Corpus
from research.errors import UserError, check, one_line

_log = logging.getLogger(__name__)
_BATCH = 256  # documents encoded at once: bounds the memory that their encodings take
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")  # as published models call it


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Ids in [0, vocab), of which `eod` ends a document and stands for no text."""

  name: str
  vocab: int
  eod: int
  sha256: str  # of everything that decides what an id means
  encode_batch: Callable[[Sequence[bytes]], list[np.ndarray]]  # UTF-8 documents -> int32 ids, without eod
  decode: Callable[[Sequence[int]], bytes]  # what ids stand for; eod and ids that were never learnt stand for none
  model: str = ""  # the library's JSON, where there is one

  def encode(self, document: bytes) -> np.ndarray:
    """int32 [tokens] of a UTF-8 document, without `eod`."""
    return self.encode_batch([document])[0]

  def file(self) -> str:
    """As a tokenizer.json that `hugging_face` reads; empty where there is none: bytes, or a bpe with ids to spare."""
    if not self.model:
      return ""
    library = tokenizers.Tokenizer.from_str(self.model)
    if self.eod not in library.get_vocab().values():
      if library.get_vocab_size() != self.eod:
        return ""
      library.add_special_tokens([_ENDS[0]])
    return library.to_str()


def byte_level() -> Tokenizer:
  """One id a byte; 0xFF, which UTF-8 never uses, is `eod`."""
  encode = lambda documents: [np.frombuffer(d, np.uint8).astype(np.int32) for d in documents]
  decode = lambda ids: bytes(i for i in ids if i != 255)
  return Tokenizer("bytes", 256, 255, hashlib.sha256(b"bytes").hexdigest(), encode, decode)


def bpe(corpus: Corpus, vocab: int) -> Tokenizer:
  """Byte-level BPE (Sennrich et al., 2016; Radford et al., 2019) learnt from `corpus`.

  `vocab` counts 256 bytes, the merges and `eod`. A small corpus may have fewer merges;
  `vocab` stays what was asked for, so that the corpus does not decide a model's shape.
  What was learnt is kept (`paths.cache`).
  """
  key = hashlib.sha256(f"{corpus.sha256} {vocab} {tokenizers.__version__}".encode()).hexdigest()
  path = paths.cache() / f"bpe-{key[:32]}.json"
  model = _cached(path)
  if model is None:
    model = _train(corpus, vocab)
    _keep(path, model)
  return learnt(model, vocab)


def learnt(model: str, vocab: int) -> Tokenizer:
  """The tokenizer that `bpe` learnt, from its `model`."""
  library = tokenizers.Tokenizer.from_str(model)
  sha256 = hashlib.sha256(f"{vocab} {model}".encode()).hexdigest()
  return Tokenizer("bpe", vocab, vocab - 1, sha256, _encoder(library), _joiner(_pieces(library, vocab)), model)


def hugging_face(spec: str) -> Tokenizer:
  """The tokenizer of a file in the format of Hugging Face's library: `PATH/tokenizer.json[?eod=TOKEN]`.

  `eod` is the token of that name, or the first of `_ENDS` that the file has. Text that
  spells a special token is encoded as the text it is. Decoding is exact where the file
  is byte-level; other files may normalise text.

  Raises UserError (`tokenizer`) if the file cannot be used, or its `eod` not be told.
  """
  path, _, eod_token = spec.partition("?eod=")
  field = ("tokenizer", f"hf:{spec}")
  try:
    model = Path(path).expanduser().read_text()
    library = tokenizers.Tokenizer.from_str(model)
  except OSError as e:
    raise UserError(*field, f"cannot be read: {e.strerror}; name a local tokenizer.json") from None
  except Exception as e:  # the library raises no class of its own
    raise UserError(*field, f"is no tokenizer.json: {one_line(e)}") from None
  # The file may say how its first user cut and padded: not what a document is.
  library.no_truncation()
  library.no_padding()
  library.encode_special_tokens = True
  ids = library.get_vocab()
  name = eod_token or next((token for token in _ENDS if token in ids), "")
  fix = f"has no token {eod_token}" if eod_token else f"has none of {' '.join(_ENDS)}"
  check(name in ids, *field, f"{fix}; name the token that ends a document: hf:{path}?eod=TOKEN")
  eod, vocab = ids[name], max(ids.values()) + 1
  sha256 = hashlib.sha256(f"{eod} {model}".encode()).hexdigest()
  encode = _without(eod, _encoder(library), *field)
  if isinstance(library.decoder, decoders.ByteLevel):
    decode = _joiner(_pieces(library, vocab))
  else:
    decode = lambda ids: library.decode([int(i) for i in ids], skip_special_tokens=True).encode()
  return Tokenizer("hf", vocab, eod, sha256, encode, decode, model)


def _encoder(library: tokenizers.Tokenizer) -> Callable[[Sequence[bytes]], list[np.ndarray]]:
  def encode_batch(documents: Sequence[bytes]) -> list[np.ndarray]:
    ids = []
    for i in range(0, len(documents), _BATCH):
      texts = [d.decode("utf-8") for d in documents[i : i + _BATCH]]
      ids += [np.array(e.ids, np.int32) for e in library.encode_batch_fast(texts, add_special_tokens=False)]
    return ids

  return encode_batch


def _without(eod: int, encode_batch, field: str, value: str):
  """`encode_batch`, refusing text that would end its own document."""

  def checked(documents: Sequence[bytes]) -> list[np.ndarray]:
    encoded = encode_batch(documents)
    ends = any((ids == eod).any() for ids in encoded)
    check(not ends, field, value, "a document's text encodes to the token that ends documents; choose another ?eod=")
    return encoded

  return checked


def _joiner(pieces: Sequence[bytes]) -> Callable[[Sequence[int]], bytes]:
  return lambda ids: b"".join(pieces[i] for i in ids)


def _pieces(library: tokenizers.Tokenizer, vocab: int) -> list[bytes]:
  """What each id of a byte-level tokenizer stands for; special tokens stand for none."""
  to_byte = {char: byte for byte, char in enumerate(_alphabet())}
  added = library.get_added_tokens_decoder()
  pieces = [b""] * vocab
  for piece, i in library.get_vocab().items():
    if i in added:
      pieces[i] = b"" if added[i].special else piece.encode()
    else:
      pieces[i] = bytes(to_byte[char] for char in piece)
  return pieces


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
