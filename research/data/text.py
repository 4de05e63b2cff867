"""Text corpora by name: documents read strictly, split by hash and pinned by hash."""

from collections.abc import Iterable, Iterator
import dataclasses
import hashlib
import json
import logging
from pathlib import Path
import platform

from research.data import sources
from research.data.sources import PART, Record
from research.errors import UserError, check, one_line

__all__ = ["PART", "SPLITS", "Corpus", "check_splits", "corpus", "documents", "info", "name_hash", "read"]

SPLITS = ("train", "validation")
VALIDATION_FRACTION = 0.05  # of the files, or of the records in files of many

_log = logging.getLogger(__name__)
_KNOWN_STDLIB = Path(__file__).with_name("stdlib_hashes.json")


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The documents of one split, sorted by name."""

  documents: tuple[tuple[str, bytes], ...]  # (name, UTF-8), neither empty nor twice the same
  sha256: str  # of names and contents
  bad: tuple[str, ...]  # names of the records that could not be read


def read(source: str, max_bad_records: int = 0) -> dict[str, Corpus]:
  """The whole corpus of a source (see `sources`), by split.

  Raises UserError for a wrong source, for one with fewer than two documents, and at
  the first bad record (unreadable, or not UTF-8) beyond `max_bad_records`.
  """
  found, bad = {split: {} for split in SPLITS}, []
  for split, name, data in documents(source, max_bad_records, bad):
    found[split][name] = data
  check_splits(source, {split: len(names) for split, names in found.items()}, bad)

  # No content says where a record that cannot be read belongs: it is told with the train split.
  return {split: corpus(found[split].items(), bad if split == "train" else ()) for split in SPLITS}


def corpus(documents: Iterable[tuple[str, bytes]], bad: Iterable[str] = ()) -> Corpus:
  """A Corpus of (name, UTF-8)."""
  chosen, h = tuple(sorted(documents)), hashlib.sha256()
  for name, data in chosen:
    h.update(name_hash(name) + hashlib.sha256(data).digest())
  return Corpus(chosen, h.hexdigest(), tuple(bad))


def documents(source: str, max_bad_records: int, bad: list[str]) -> Iterator[tuple[str, str, bytes]]:
  """(split, name, UTF-8) of every document, one after the other, in an order that never varies.

  A file with one document is split by the hash of its name, a record of a file with many
  by the hash of its content, so that the other files and records do not matter. If
  nothing falls into validation, what has the smallest hash does. A source with a
  validation or test split of its own keeps it. Of equal contents the first stays; empty
  ones are left out. Names of bad records are appended to `bad`.

  Holds 16 bytes of hash a document, and the documents before the first of validation.
  """
  limit = int(VALIDATION_FRACTION * 2**64).to_bytes(8, "big")
  waiting, is_split = [], False
  for record, data in _good(sources.records(source), max_bad_records, bad):
    if record.split is not None:
      yield record.split, record.name, data
      continue
    key = hashlib.sha256(data).digest() if record.by_content else name_hash(record.name)
    waiting.append((key, record.name, data))
    is_split = is_split or key[:8] < limit
    if is_split:
      for key, name, data in waiting:
        yield SPLITS[key[:8] < limit], name, data
      waiting.clear()
  smallest = min((key for key, _, _ in waiting), default=None)
  for key, name, data in waiting:
    yield SPLITS[key == smallest], name, data


def check_splits(source: str, count: dict[str, int], bad: list[str]) -> None:
  """Raises UserError unless there are documents in every split."""
  fix = "needs two documents, one of them for validation"
  if bad:
    fix += f" ({len(bad)} could not be read: {bad[0]}{', ...' if len(bad) > 1 else ''})"
  check(all(count[split] > 0 for split in SPLITS), "source", source, fix)


def info(source: str, corpora: dict[str, Corpus]) -> dict:
  """What was read, for the manifest; `known`: the content is the one pinned for this Python."""
  python = platform.python_version()
  sha256 = {split: corpus.sha256 for split, corpus in corpora.items()}
  pinned = json.loads(_KNOWN_STDLIB.read_text()) if source == "stdlib" else {}
  return {
    "source": source,
    "python": python,
    "known": pinned.get(python) == sha256,
    "sha256": sha256,
    "documents": {split: len(corpus.documents) for split, corpus in corpora.items()},
    "bytes": {split: sum(len(data) for _, data in corpus.documents) for split, corpus in corpora.items()},
    "bad_records": [name for corpus in corpora.values() for name in corpus.bad],
  }


def name_hash(name: str) -> bytes:
  """A hash of a document's name that is the same in every process and on every machine."""
  return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def _good(records: Iterable[Record], max_bad_records: int, bad: list[str]) -> Iterator[tuple[Record, bytes]]:
  seen = set()
  for record in records:
    try:
      data = record.read()
      data.decode("utf-8")
    except sources.BAD as e:
      bad.append(record.name)
      why = one_line(e)
      if len(bad) > max_bad_records:
        fix = f"{record.name} is bad record number {len(bad)} ({why}); repair or remove it, or raise the limit"
        raise UserError("max_bad_records", max_bad_records, fix) from e
      _log.warning("skipped %s: %s", record.name, why)
      continue
    digest = hashlib.sha256(data).digest()[:16]
    if data and digest not in seen:
      seen.add(digest)
      yield record, data
