"""A directory of published weights: `config.json` beside files of tensors, opened without reading the tensors.

The files are safetensors, or where there are none PyTorch's `.bin`, `.pt` or `.pth`, of which no
program is run; see `research.models.convert.torch_files`.
"""

from collections.abc import Mapping
import json
import os
import pathlib
import shutil
from typing import Any

from jax import numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from research.errors import UserError, check, one_line
from research.models.convert import torch_files

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16)}
INDEX = "model.safetensors.index.json"
_BIN = "pytorch_model.bin"
_ZIPS = (".pt", ".pth", ".bin", ".ckpt")  # as torch.save names its files
_PICKLES = (*_ZIPS, ".pkl")
_VIEWS = DTYPES | {"I64": np.dtype(np.int64)}


class Stored:
  """A tensor in a file: its dtype by safetensors' name, its shape, and on demand a view of the mapped file."""

  def __init__(self, data: np.ndarray, dtype: str, shape: tuple[int, ...], start: int):
    self.dtype, self.shape = dtype, shape
    self._data, self._start = data, start

  def view(self) -> np.ndarray:
    """The tensor as it lies in the file; only what is touched is read. Its dtype must be one of DTYPES, or I64."""
    return np.ndarray(self.shape, _VIEWS[self.dtype], self._data, self._start)

  def __str__(self) -> str:
    return f"{self.dtype} {list(self.shape)}"


def is_weights(path: str | os.PathLike) -> bool:
  """Whether `path` looks like weights, good or bad, and not like a workdir: a directory of them, or a file."""
  path = pathlib.Path(path)
  if path.is_file():
    return path.suffix in (".safetensors", *_PICKLES)
  if not path.is_dir():
    return False
  return any(f.name in ("config.json", INDEX) or f.suffix in (".safetensors", *_PICKLES) for f in path.iterdir())


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A file that holds one JSON object. Raises UserError."""
  try:
    value = json.loads(path.read_text("utf-8"))
  except OSError as e:
    raise UserError("weights", path, f"cannot be read: {e.strerror}") from None
  except (ValueError, RecursionError) as e:
    raise UserError("weights", path, f"is not JSON: {one_line(e)}") from None
  check(isinstance(value, dict), "weights", path, "must be a JSON object")
  return value


def open_tensors(directory: pathlib.Path, member: str | None = None) -> dict[str, Stored]:
  """Every tensor of `directory`, or of a file, by key; of its `member` for a nested file of PyTorch's.

  Raises UserError for files that are absent, damaged or contradict the index.
  """
  if directory.is_file():
    return _open_file(directory, member)
  safe = any(directory.glob("*.safetensors*")) or not any(directory.glob(f"{_BIN}*"))
  single, open_file = directory / ("model.safetensors" if safe else _BIN), _open if safe else _open_bin
  index = directory / f"{single.name}.index.json"
  if single.is_file() or not index.is_file():
    return _open_file(single if single.is_file() else _only_file(directory), member)
  where = read_json(index).get("weight_map")
  ok = isinstance(where, dict) and where and all(_plain_name(name, single.suffix) for name in where.values())
  check(bool(ok), "weights", index, "needs a weight_map from keys to the names of files beside it")
  tensors = {}
  for name in sorted(set(where.values())):
    check((directory / name).is_file(), "weights", directory / name, f"is missing; {index.name} names it")
    held = open_file(directory / name)
    said = {key for key, file in where.items() if file == name}
    for keys, fault in ((said - held.keys(), "does not hold"), (held.keys() - said, "also holds")):
      few = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
      check(not keys, "weights", directory / name, f"{fault} {few}, unlike what {index.name} says")
    tensors |= held
  return tensors


def write(directory: pathlib.Path, config: Mapping[str, Any], sizes: Mapping[str, int], tensor, shard_bytes: int):
  """Makes `directory` of `config` and the tensors `tensor(key)`, whole or not at all.

  sizes: bytes of every tensor, in the order in which they fill files of at most
  `shard_bytes` (a larger tensor has a file to itself). Raises UserError where
  something is there already.
  """
  empty = not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))
  check(empty, "out", directory, "is there already; name a new directory")
  shards: list[list[str]] = [[]]
  room = shard_bytes
  for key, size in sizes.items():
    if shards[-1] and size > room:
      shards.append([])
      room = shard_bytes
    shards[-1].append(key)
    room -= size
  names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
  names = names if len(names) > 1 else ["model.safetensors"]
  try:
    partial = directory.absolute().with_name(f".{directory.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
  except OSError as e:
    raise UserError("out", directory, f"cannot be written: {e.strerror}") from None
  try:
    for name, keys in zip(names, shards, strict=True):
      # contiguous: the library writes the memory behind the pointer and knows no strides
      save_file({key: np.ascontiguousarray(tensor(key)) for key in keys}, partial / name, {"format": "pt"})
    if len(names) > 1:
      where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
      _write_json(partial / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})
    _write_json(partial / "config.json", config)
    for name in names:  # the library makes files that only their owner may read
      (partial / name).chmod((partial / "config.json").stat().st_mode)
    partial.replace(directory)
  except (OSError, safetensors.SafetensorError) as e:
    raise UserError("out", directory, f"cannot be written: {one_line(e)}") from None
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _only_file(directory: pathlib.Path) -> pathlib.Path:
  check(directory.is_dir(), "weights", directory, "no such directory")
  files = sorted(directory.glob("*.safetensors"))
  zips = sorted(f for f in directory.iterdir() if f.suffix in _ZIPS)
  if not files and not zips:
    pickles = [f.name for f in directory.iterdir() if f.suffix in _PICKLES]
    fix = f"{pickles[0]} is a pickle, which is never opened here; convert it" if pickles else "there is none in it"
    raise UserError("weights", directory, f"give a directory with model.safetensors; {fix}")
  names = ", ".join(f.name for f in zips)
  check(files or len(zips) == 1, "weights", directory, f"holds {names}: give one of them")
  check(len(files) <= 1, "weights", directory, f"holds {len(files)} safetensors files and no {INDEX}")
  return (files or zips)[0]


def _open_file(path: pathlib.Path, member: str | None) -> dict[str, Stored]:
  if path.suffix in _ZIPS:
    return _open_bin(path, member)
  check(member is None, "member", member, f"{path.name} has none: only files of torch.save are nested")
  return _open(path)


def _open(path: pathlib.Path) -> dict[str, Stored]:
  try:
    with safetensors.safe_open(path, "np"):
      pass  # the library checks the header, and that the tensors fill the file exactly
    with path.open("rb") as file:
      size = int.from_bytes(file.read(8), "little")
      header = json.loads(file.read(size))
  except safetensors.SafetensorError as e:
    raise UserError("weights", path, f"is damaged or no safetensors file: {one_line(e)}") from None
  except OSError as e:
    raise UserError("weights", path, f"cannot be read: {one_line(e)}") from None
  header.pop("__metadata__", None)
  full = any(t["data_offsets"][1] for t in header.values())
  data = np.memmap(path, np.uint8, "r", offset=8 + size) if full else np.empty(0, np.uint8)
  return {key: Stored(data, t["dtype"], tuple(t["shape"]), t["data_offsets"][0]) for key, t in header.items()}


def _open_bin(path: pathlib.Path, member: str | None = None) -> dict[str, Stored]:
  data, held = torch_files.open_tensors(path, member)
  return {key: Stored(data, t.dtype, t.shape, t.start) for key, t in held.items()}


def _plain_name(name: Any, suffix: str) -> bool:
  return isinstance(name, str) and name.endswith(suffix) and pathlib.PurePath(name).name == name
