"""Text corpora by name: documents read strictly, split by file and pinned by hash.

A source is a function `argument -> records`, a record being a name and a function
that reads its bytes. What all sources share (UTF-8, bad records, duplicates, the
split, the hashes) is done here, once.
"""

from collections.abc import Callable, Iterable
import dataclasses
import hashlib
import json
import logging
import os
from pathlib import Path
import platform
import sysconfig

from research.errors import UserError, check

SPLITS = ("train", "validation")
VALIDATION_FRACTION = 0.05  # of the files
PART = "//"  # between the names of a file and of a document in it: no path has it

Records = Iterable[tuple[str, Callable[[], bytes]]]

_log = logging.getLogger(__name__)
_KNOWN_STDLIB = Path(__file__).with_name("stdlib_hashes.json")
_TOPICS = "pydoc_data/topics.py"


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The documents of one split, sorted by name."""

  documents: tuple[tuple[str, bytes], ...]  # (name, UTF-8), neither empty nor twice the same
  sha256: str  # of names and contents
  bad: tuple[str, ...]  # names of the records that could not be read


def stdlib(argument: str = "") -> Records:
  """The running interpreter's standard library and its documentation: about 11 MB, no download."""
  check(not argument, "source", f"stdlib:{argument}", "stdlib takes no argument; write source=stdlib")
  # Left out besides the tests: what the build of the interpreter wrote, which differs between machines.
  skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload"}
  for name, path in _files(sysconfig.get_paths()["stdlib"], (".py",)):
    *folders, base = name.split("/")
    if skip.intersection(folders) or name.startswith("config-") or base.startswith("_sysconfigdata"):
      continue
    if name != _TOPICS:
      yield name, path.read_bytes
  from pydoc_data.topics import topics

  for topic in sorted(topics):
    yield _TOPICS + PART + topic, topics[topic].encode


def files(argument: str) -> Records:
  """The .txt, .md and .py files under a directory."""
  source = f"files:{argument}"
  check(argument != "", "source", source, "name a directory, as in source=files:DIR")
  root = Path(argument).expanduser()
  check(root.is_dir(), "source", source, "there is no such directory")
  found = _files(root, (".txt", ".md", ".py"))
  check(len(found) > 0, "source", source, "the directory holds no .txt, .md or .py file")
  return ((name, path.read_bytes) for name, path in found)


SOURCES = {"stdlib": stdlib, "files": files}


def read(source: str, max_bad_records: int = 0) -> dict[str, Corpus]:
  """The corpus `name` or `name:argument` of SOURCES, by split.

  The hash of its name decides the split of a file, whatever the order of the file system
  and the other files. Of equal contents the first name stays.

  Raises UserError for an unknown source, for one with fewer than two files, and at
  the first bad record (unreadable, or not UTF-8) beyond `max_bad_records`.
  """
  kind, _, argument = source.partition(":")
  check(kind in SOURCES, "source", source, f"there is no such source; choose one of {', '.join(SOURCES)}")
  documents, bad = _read(SOURCES[kind](argument), max_bad_records)
  held_out = _held_out(documents)
  check(0 < len(held_out) < len(documents), "source", source, "needs two documents, one of them for validation")

  def corpus(is_validation: bool) -> Corpus:
    chosen = tuple(d for d in documents.items() if (d[0] in held_out) == is_validation)
    # No content says where a record that cannot be read belongs: it is told with the train split.
    return Corpus(chosen, _sha256(chosen), () if is_validation else bad)

  return {split: corpus(split == "validation") for split in SPLITS}


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


def _files(root: str | Path, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
  """(relative name, path) of the files under `root`, sorted by name; hidden ones are left out."""
  found = []
  for folder, folders, names in os.walk(root):
    folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
    found += [Path(folder, name) for name in names if name.endswith(suffixes) and not name.startswith(".")]
  return sorted((path.relative_to(root).as_posix(), path) for path in found)


def _read(records: Records, max_bad_records: int) -> tuple[dict[str, bytes], tuple[str, ...]]:
  documents, bad, seen = {}, [], set()
  for name, read_bytes in records:
    try:
      data = read_bytes()
      data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as e:
      bad.append(name)
      if len(bad) > max_bad_records:
        fix = f"{name} is bad record number {len(bad)} ({e}); repair or remove it, or raise the limit"
        raise UserError("max_bad_records", max_bad_records, fix) from e
      _log.warning("skipped %s: %s", name, e)
      continue
    digest = hashlib.sha256(data).digest()
    if data and digest not in seen:
      seen.add(digest)
      documents[name] = data
  return dict(sorted(documents.items())), tuple(bad)


def _held_out(names: Iterable[str]) -> set[str]:
  """The files for validation: those whose hash is small, or else the one with the smallest."""
  # Documents of one file (the topics) quote one another, so they must not be parted, and all
  # of them would be half of the validation split: they are for training.
  hashes = {name: name_hash(name) for name in names if PART not in name}
  limit = int(VALIDATION_FRACTION * 2**64).to_bytes(8, "big")
  return {name for name, h in hashes.items() if h[:8] < limit} or set(sorted(hashes, key=hashes.get)[:1])


def _sha256(documents: Iterable[tuple[str, bytes]]) -> str:
  h = hashlib.sha256()
  for name, data in documents:
    h.update(name_hash(name) + hashlib.sha256(data).digest())
  return h.hexdigest()
