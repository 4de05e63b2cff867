"""Where text comes from: `kind:argument?option=value` as a stream of records.

A source only finds and opens; what all sources share (UTF-8, bad records, duplicates,
the split, the hashes) is done in `research.data.text`, once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import difflib
import functools
import gzip
import io
import json
import os
from pathlib import Path
import shutil
import sysconfig
import tempfile
from typing import BinaryIO
import zlib

from research.errors import UserError, check, one_line

PART = "//"  # between the names of a file and of a document in it: no path has it
# What reading a record may raise: the record is bad, and nothing else.
BAD = (OSError, EOFError, ValueError, zlib.error)

_TOPICS = "pydoc_data/topics.py"
_PLAIN, _MANY, _COMPRESSED = (".txt", ".md", ".py"), (".jsonl", ".parquet"), (".gz", ".zst")


@dataclasses.dataclass(frozen=True)
class Record:
  """One document, not yet read."""

  name: str  # a file, or a file and the line or row in it: FILE:17
  read: Callable[[], bytes]  # raises one of BAD
  split: str | None = None  # the source's own; None: a hash decides
  by_content: bool = False  # the hash of the content decides, not that of the name


def parse(source: str, kinds: dict[str, tuple] | None = None) -> tuple[str, str, dict[str, str]]:
  """(kind, argument, options) of `kind:argument?option=value&option=value`. Raises UserError.

  kinds: {kind: (anything, its options)}; None: those of text.
  """
  kinds = KINDS if kinds is None else kinds
  kind, _, rest = source.partition(":")
  check(kind in kinds, "source", source, f"there is no such source; choose one of {', '.join(kinds)}")
  argument, _, query = rest.partition("?")
  options = {}
  for item in filter(None, query.split("&")):
    name, _, value = item.partition("=")
    known = ", ".join(kinds[kind][1]) or "none"
    check(name in kinds[kind][1] and value != "", "source", source, f"?{item} is no option=value; options: {known}")
    options[name] = value
  return kind, argument, options


def records(source: str) -> Iterable[Record]:
  """The records of a source of text, in an order that never varies. Raises UserError."""
  kind, argument, options = parse(source)
  check(kind != "shards", "source", source, "holds tokens, not text")
  return KINDS[kind][0](source, argument, **options)


def stdlib(source: str, argument: str) -> Iterator[Record]:
  """The running interpreter's standard library and its documentation: about 11 MB, no download."""
  check(not argument, "source", source, "stdlib takes no argument; write source=stdlib")
  return _stdlib()


def _stdlib() -> Iterator[Record]:
  # Left out besides the tests: what the build of the interpreter wrote, which differs between machines.
  skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload"}
  for name, path in find(sysconfig.get_paths()["stdlib"], (".py",)):
    *folders, base = name.split("/")
    if skip.intersection(folders) or name.startswith("config-") or base.startswith("_sysconfigdata"):
      continue
    if name != _TOPICS:
      yield Record(name, path.read_bytes)
  from pydoc_data.topics import topics

  # They quote one another, so they must not be parted, and all of them would be half of
  # the validation split: they are for training.
  for topic in sorted(topics):
    yield Record(_TOPICS + PART + topic, topics[topic].encode, split="train")


def files(source: str, argument: str, field: str = "text") -> Iterator[Record]:
  """Files under a directory: one document each, or one a line (.jsonl) or row (.parquet), in its `field`."""
  check(argument != "", "source", source, "name a directory, as in source=files:DIR")
  root = Path(argument).expanduser()
  check(root.is_dir(), "source", source, "there is no such directory")
  kinds = _PLAIN + _MANY
  found = find(root, kinds + tuple(kind + packed for kind in kinds for packed in _COMPRESSED))
  check(len(found) > 0, "source", source, f"the directory holds no {', '.join(kinds[:-1])} or {kinds[-1]} file")
  return _files(source, found, field)


def _files(source: str, found: list[tuple[str, Path]], field: str) -> Iterator[Record]:
  for name, path in found:
    suffix = Path(name.removesuffix(".gz").removesuffix(".zst")).suffix
    if suffix in _PLAIN:
      yield Record(name, functools.partial(_read_all, path))
    elif suffix == ".jsonl":
      yield from _goes_on(name, _jsonl(name, path, field))
    else:
      yield from _goes_on(name, _parquet(source, name, path, field))


def _goes_on(name: str, found: Iterator[Record]) -> Iterator[Record]:
  """The records of a file; where it breaks off, the rest of it is one bad record."""
  last = name
  try:
    for record in found:
      last = record.name
      yield record
  except BAD as e:
    broken = e

    def read() -> bytes:
      raise OSError(f"the file cannot be read after this: {broken}") from broken

    yield Record(last, read, by_content=True)


def _jsonl(name: str, path: Path, field: str) -> Iterator[Record]:
  with open_file(path) as lines:
    for number, line in enumerate(lines, 1):
      if not line.isspace():
        yield Record(f"{name}:{number}", functools.partial(_json_field, line, field), by_content=True)


def _json_field(line: bytes, field: str) -> bytes:
  try:
    value = json.loads(line)
  except RecursionError as e:
    raise ValueError("the line is nested too deeply") from e
  if not isinstance(value, dict):
    raise ValueError("the line is no JSON object")
  if field not in value:
    raise ValueError(f"no field {field}, choose with ?field= from {', '.join(value) or 'none'}")
  return _encode(value[field], field)


def _parquet(source: str, name: str, path: Path, field: str) -> Iterator[Record]:
  import pyarrow as pa
  from pyarrow import parquet

  with tempfile.TemporaryFile() as plain:
    seekable = path
    if path.suffix != ".parquet":
      with open_file(path) as packed:
        shutil.copyfileobj(packed, plain)
      seekable = plain
    with parquet.ParquetFile(seekable) as table:
      columns = [c.name for c in table.schema_arrow if pa.types.is_string(c.type) or pa.types.is_large_string(c.type)]
      fix = f"{name} has no text column {field}; choose one with ?field= from {', '.join(columns) or 'none'}"
      check(field in columns, "source", source, fix)
      row = 0
      for batch in table.iter_batches(batch_size=256, columns=[field]):
        for value in batch.column(0).to_pylist():
          row += 1
          yield Record(f"{name}:{row}", functools.partial(_encode, value, field), by_content=True)


def tfds(source: str, argument: str, field: str = "text", split: str = "train", dir: str = "") -> Iterator[Record]:
  """A prepared TFDS dataset NAME[/CONFIG][:VERSION]: its own validation or test split is held out if it has one.

  Nothing is downloaded. `dir` is tfds's data_dir, by default $TFDS_DATA_DIR.
  """
  name, found = tfds_splits(source, argument, (field,), split, dir)

  def read(rows, i) -> bytes:
    try:
      value = rows[i][field]
    except RuntimeError as e:  # a record that fails the checksum of its format
      raise ValueError(one_line(e)) from e
    return _encode(value, field)

  return (
    Record(f"{name}/{of}:{i}", functools.partial(read, rows, i), part, by_content=True)
    for of, part, rows in found
    for i in range(len(rows))
  )


def tfds_splits(source: str, argument: str, fields: Sequence[str], split: str, dir: str) -> tuple[str, list]:
  """(name, [(its split, "train", "validation" or None, its examples)]) of a prepared TFDS dataset that has `fields`.

  Its split `validation`, or else `test`, is held out; None where it has neither. Raises UserError.
  """
  check(argument != "", "source", source, "name a dataset, as in source=tfds:ag_news_subset")
  import tensorflow_datasets

  root = os.path.expanduser(dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
  try:
    builder = tensorflow_datasets.core.read_only_builder.builder_from_files(argument, data_dir=root)
  except Exception:  # whatever kept tfds from finding it, what helps is in the line
    raise UserError("source", source, _not_prepared(tensorflow_datasets, argument, root)) from None
  splits, features = list(builder.info.splits), sorted(getattr(builder.info.features, "keys", list)())
  check(split in splits, "source", source, f"has no split {split}; choose one with ?split= from {', '.join(splits)}")
  for field in fields:
    fix = f"has no field {field}; choose one with ?field= from {', '.join(features) or 'none'}"
    check(field in features, "source", source, fix)
  held_out = next((name for name in ("validation", "test") if name in splits and name != split), None)
  parts = {split: None if held_out is None else "train"} | ({held_out: "validation"} if held_out else {})
  try:
    return builder.name, [(name, part, builder.as_data_source(name)) for name, part in parts.items()]
  except NotImplementedError:
    made = builder.info.file_format.value
    raise UserError("source", source, f"is prepared as {made}; prepare it with file_format=array_record") from None
  except Exception as e:
    raise UserError("source", source, f"cannot be opened: {one_line(e)}") from e


def _not_prepared(tensorflow_datasets, argument: str, root: str) -> str:
  name = argument.partition(":")[0]
  known = tensorflow_datasets.list_builders(with_community_datasets=False)
  dataset = name.partition("/")[0]
  if dataset in known or os.path.isdir(os.path.join(root, dataset)):
    command = f"import tensorflow_datasets as t; t.data_source('{name}', data_dir='{root}')"
    return f'is not prepared under {root} (nor fetched by a run); prepare it once: python -c "{command}"'
  # tfds lists no dataset whose code needs TensorFlow or Beam: such a one may exist, prepared elsewhere.
  close = difflib.get_close_matches(dataset, known, n=1)
  return f"{root} has no such dataset, nor does tfds list it{f'; did you mean {close[0]}?' if close else ''}"


def _encode(value: object, field: str) -> bytes:
  if isinstance(value, bytes):
    return value
  if not isinstance(value, str):
    raise ValueError(f"{field} is no text but {type(value).__name__}")
  return value.encode("utf-8")


def find(root: str | Path, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
  """(relative name, path) of the files under `root`, sorted by name; hidden ones are left out."""
  found = []
  for folder, folders, names in os.walk(root):
    folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
    found += [Path(folder, name) for name in names if name.endswith(suffixes) and not name.startswith(".")]
  return sorted((path.relative_to(root).as_posix(), path) for path in found)


def open_file(path: Path) -> BinaryIO:
  if path.suffix == ".gz":
    return gzip.open(path)
  if path.suffix == ".zst":
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 2**20)
  return path.open("rb")


def _read_all(path: Path) -> bytes:
  with open_file(path) as f:
    return f.read()


# By kind: the function of (source, argument, **options) and the options it takes.
KINDS = {
  "stdlib": (stdlib, ()),
  "files": (files, ("field",)),
  "tfds": (tfds, ("field", "split", "dir")),
  "shards": (None, ()),
}
