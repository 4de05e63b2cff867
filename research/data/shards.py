"""Tokenized documents on disk: ArrayRecord shards, and rows read from them with random access.

A split is one stream of ids: eod, document, eod, document, eod ... as `PackedDocuments`
keeps in memory. It is cut into pieces of `PIECE` ids, each a record of little-endian
unsigned integers; a shard holds `shard_tokens` ids, the last one what is left. So the
position of a token tells its shard and record, a row reads two records at most, however
long a document is, and nothing about documents is held in memory.
"""

import hashlib
import json
import os
from pathlib import Path
import threading

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
import numpy as np

from research.data import tokenizer as tokenizers
from research.data.packing import PackedDocuments
from research.errors import UserError, check

FORMAT = 1
PIECE = 4096  # ids in a record
MANIFEST, MODEL = "manifest.json", "tokenizer.json"
TOOL = "research.tools.tokenize"


class PackedShards(PackedDocuments):
  """Rows as of `PackedDocuments`, of documents in the order in which they were written.

  Files are opened when first read. The format has a checksum for every record: rows of
  damaged ones raise UserError, naming the shard.
  """

  def __init__(self, source: str, split: str, length: int, *, drop_last: bool):
    about = manifest(source)
    self._source, self._records = source, Records(source, about["splits"][split]["shards"])
    self.positions = about["splits"][split]["tokens"]
    self._length, self._eod, self._drop_last = length, about["tokenizer"]["eod"], drop_last
    self._dtype = dtype(about["tokenizer"]["vocab"])
    self._pieces = about["settings"]["shard_tokens"] // PIECE  # in a shard

  def documents_of(self, i: int) -> list[str]:
    """[]: shards do not keep the names of documents."""
    return []

  def _read(self, lo: int, hi: int) -> np.ndarray:
    pieces = range(lo // PIECE, (hi - 1) // PIECE + 1)
    ids = np.concatenate([self._piece(i) for i in pieces])
    return ids[lo - pieces[0] * PIECE : hi - pieces[0] * PIECE]

  def _piece(self, i: int) -> np.ndarray:
    shard, record = divmod(i, self._pieces)
    data = self._records.read(shard, record)
    if len(data) != self._dtype.itemsize * min(PIECE, self.positions + 1 - i * PIECE):
      raise damaged(self._source, self._records.shards[shard]["file"])
    return np.frombuffer(data, self._dtype)


class Records:
  """The records of some shards by number; files are opened when first read. Damaged ones raise UserError."""

  def __init__(self, source: str, shards: list[dict], tool: str = TOOL):
    self.shards, self._source, self._folder, self._tool = shards, source, folder(source), tool
    self._readers, self._lock = {}, threading.Lock()

  def read(self, shard: int, record: int) -> bytes:
    try:
      return self._reader(shard).read([record])[0]
    except (RuntimeError, ValueError, IndexError, OSError) as e:
      raise damaged(self._source, self.shards[shard]["file"], self._tool) from e

  def _reader(self, shard: int) -> ArrayRecordReader:
    with self._lock:
      if shard not in self._readers:
        path = str(self._folder / self.shards[shard]["file"])
        # Rows are read in random order: what lies behind a record is not wanted.
        self._readers[shard] = ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=2**15)
      return self._readers[shard]


def folder(source: str) -> Path:
  """The directory of `shards:DIR`."""
  return Path(source.partition(":")[2]).expanduser()


def manifest(source: str, tool: str = TOOL, form: int | str = FORMAT) -> dict:
  """The manifest of `shards:DIR`, written by `tool` in format `form`; every shard it names has the size it says.

  Raises UserError (`source`) if there is none, it is damaged or not finished, or a shard
  is missing or cut short.
  """
  root = folder(source)
  check(source.partition(":")[2] != "", "source", source, f"name a directory, as in source={source}DIR")
  check(root.is_dir(), "source", source, "there is no such directory")
  check((root / MANIFEST).is_file(), "source", source, f"has no {MANIFEST}; write it with {tool}")
  try:
    about = json.loads((root / MANIFEST).read_bytes())
    check(about["format"] == form, "source", source, f"has format {about['format']}, not {form}; write it again")
    check(about["complete"] is True, "source", source, f"is not finished; run {tool} on it again")
    for split in about["splits"].values():
      for shard in split["shards"]:
        path = root / shard["file"]
        check(path.is_file(), "source", source, f"{shard['file']} is missing")
        if path.stat().st_size != shard["size"]:
          raise damaged(source, shard["file"], tool)
  except (ValueError, KeyError, TypeError, AttributeError, OSError):
    raise UserError("source", source, f"its {MANIFEST} is damaged; write it with {tool}") from None
  return about


def tokenizer(source: str, about: dict) -> tokenizers.Tokenizer:
  """The bpe that the shards were written with, `about` being its entry in the manifest.

  Raises UserError if its file is not the one that was written.
  """
  try:
    learnt = tokenizers.learnt((folder(source) / MODEL).read_text(), about["vocab"])
  except Exception as e:  # the library raises no class of its own
    raise damaged(source, MODEL) from e
  if learnt.sha256 != about["sha256"]:
    raise damaged(source, MODEL)
  return learnt


def damaged(source: str, file: str, tool: str = TOOL) -> UserError:
  return UserError("source", source, f"{file} is damaged: restore it, or write it again with {tool}")


def begin_shard(root: Path, split: str, entry: dict) -> tuple[ArrayRecordWriter, Path]:
  """(the writer of a split's next shard, which has its name when `end_shard` gives it, and that name)."""
  path = root / f"{split}-{len(entry['shards']):05d}.array_record"
  return ArrayRecordWriter(f"{path}.tmp", "group_size:1,zstd:1"), path


def end_shard(writer: ArrayRecordWriter, path: Path) -> dict:
  """Closes the writer of `path`.tmp and gives the file its name, whole on the disk; its entry of a manifest."""
  writer.close()
  with open(f"{path}.tmp", "rb+") as f:
    sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    os.fsync(f.fileno())
  os.replace(f"{path}.tmp", path)
  return {"file": path.name, "size": os.path.getsize(path), "sha256": sha256}


class ShardWriter:
  """Writes one split, shard by shard, going on after the last whole one of a manifest's entry.

  Every document is given to `skips`, and those that it does not take to `add`. `entry` is
  the split's part of the manifest; `on_shard()` is called when another whole shard is in it.
  """

  def __init__(self, root: Path, split: str, tokenizer, shard_tokens: int, entry: dict, on_shard):
    self.documents = self.bytes = 0
    self.entry, self._on_shard = entry, on_shard
    self._root, self._split, self._eod = root, split, tokenizer.eod
    self._room = self._size = shard_tokens
    self._resume, self._content = entry.get("cursor"), hashlib.sha256()
    self._piece, self._fill, self._writer = np.empty(PIECE, dtype(tokenizer.vocab)), 0, None
    if self._resume is None:
      self._put(np.array([self._eod]))

  def skips(self, document: bytes) -> bool:
    """Whether `document` lies in finished shards, whole."""
    skip = self._resume is not None and self.documents < self._resume["documents"]
    if skip:
      self._count(document)
    return skip

  def add(self, document: bytes, ids: np.ndarray) -> None:
    """Appends a document. Raises UserError if what was skipped is not what the shards hold."""
    self._count(document)
    stream, done = np.append(ids, self._eod), 0
    if self._resume is not None:
      check(self._content.hexdigest() == self._resume["content"], *self._changed())
      done, self._resume = self._resume["ids"], None
    while done < len(stream):
      done += self._put(stream[done:])
      if self._room == 0:
        self._end_shard()
        self.entry["cursor"] = {
          "documents": self.documents - 1,
          "ids": done,  # of the document after those
          "content": self._content.hexdigest(),
        }
        self._on_shard()

  def finish(self) -> None:
    """Writes what is left, and the totals into `entry`."""
    check(self._resume is None, *self._changed())
    written = len(self.entry["shards"]) * self._size + self._size - self._room
    if self._fill:
      self._end_piece()
    if self._writer is not None:
      self._end_shard()
    self.entry.pop("cursor", None)
    self.entry |= {"documents": self.documents, "tokens": written - 1, "bytes": self.bytes}
    self.entry["sha256"] = self._content.hexdigest()

  def _count(self, document: bytes) -> None:
    self.documents += 1
    self.bytes += len(document)
    self._content.update(hashlib.sha256(document).digest())

  def _put(self, ids: np.ndarray) -> int:
    """Appends as many of `ids` as the piece has room for; returns their number."""
    ids = ids[: PIECE - self._fill]
    self._piece[self._fill : self._fill + len(ids)] = ids
    self._fill += len(ids)
    self._room -= len(ids)
    if self._fill == PIECE:
      self._end_piece()
    return len(ids)

  def _end_piece(self) -> None:
    if self._writer is None:
      self._writer, self._path = begin_shard(self._root, self._split, self.entry)
    self._writer.write(self._piece[: self._fill].tobytes())
    self._fill = 0

  def _end_shard(self) -> None:
    self.entry["shards"].append(end_shard(self._writer, self._path))
    self._writer, self._room = None, self._size

  def _changed(self) -> tuple[str, Path, str]:
    return "out", self._root, f"the source is not what its {self._split} shards were written from; use another --out"


def dtype(vocab: int) -> np.dtype:
  """Of stored ids: the same bytes on every machine."""
  return np.dtype("<u2" if vocab <= 2**16 else "<u4")


def info(source: str) -> dict:
  """What the shards hold, as `text.info` tells it."""
  about = manifest(source)
  splits = about["splits"].items()
  return {
    "source": source,
    "written_from": about["settings"]["source"],
    "known": False,
    "sha256": {split: entry["sha256"] for split, entry in splits},
    "documents": {split: entry["documents"] for split, entry in splits},
    "bytes": {split: entry["bytes"] for split, entry in splits},
    "bad_records": about["bad_records"],
  }
