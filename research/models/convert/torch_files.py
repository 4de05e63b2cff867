"""Tensors in the zip files of PyTorch's `torch.save`, opened without PyTorch and without running what they say.

Such a file holds a pickle that says which tensors there are, and their numbers beside it.
A pickle is a program that calls functions by name. Here it finds only what a dictionary of
tensors needs: dictionaries, the names of storages, functions of this file that make a
tuple, and an empty class for the options that training scripts save beside them. Any other name ends
the reading before anything is called.
"""

import collections
from collections.abc import Mapping
import io
import math
import pathlib
import pickle
from typing import Any, NamedTuple
import zipfile

import numpy as np

from research.errors import UserError, check, one_line

# PyTorch's storages by safetensors' name of their numbers, and bytes of one
_STORAGES = {
  "FloatStorage": ("F32", 4),
  "BFloat16Storage": ("BF16", 2),
  "HalfStorage": ("F16", 2),
  "DoubleStorage": ("F64", 8),
  "LongStorage": ("I64", 8),
  "IntStorage": ("I32", 4),
  "ByteStorage": ("U8", 1),
  "BoolStorage": ("BOOL", 1),
}
# where checkpoints have the model, the first that is there; the last two are VAR's and CCA's
_MEMBERS = ("", "model", "module", "state_dict", "trainer.var_wo_ddp", "trainer")
_HEADER = 30  # bytes of a zip member's header before its name


class Found(NamedTuple):
  """A tensor of the file: its dtype by safetensors' name, its shape, where its first byte is."""

  dtype: str
  shape: tuple[int, ...]
  start: int


class _Storage(NamedTuple):
  dtype: str
  size: int
  start: int
  end: int


def open_tensors(path: pathlib.Path, member: str | None = None) -> tuple[np.ndarray, dict[str, Found]]:
  """The bytes of the file, mapped, and where in them each tensor of its `member` lies.

  member: where in nested dictionaries the tensors by name are, e.g. trainer.vae_local; default: the
  first of those places where the released code puts them. Raises UserError for any other file.
  """
  try:
    with zipfile.ZipFile(path) as file:
      members = {info.filename.partition("/")[2]: info for info in file.infolist()}
      check("data.pkl" in members, "weights", path, "holds no data.pkl, as torch.save writes it; convert it")
      order = file.read(members["byteorder"]) if "byteorder" in members else b"little"
      check(order == b"little", "weights", path, f"is {order.decode(errors='replace')}-endian; convert it")
      data = np.memmap(path, np.uint8, "r")
      held = _Unpickler(file.read(members["data.pkl"]), path, members, data).load()
  except UserError:
    raise
  except OSError as e:
    raise UserError("weights", path, f"cannot be read: {e.strerror or e}") from None
  except zipfile.BadZipFile:
    raise UserError("weights", path, "is no zip file of torch.save, and other pickles are never opened") from None
  except Exception as e:  # a damaged pickle fails in any way
    raise UserError("weights", path, f"is damaged: {one_line(e) or type(e).__name__}") from None
  places = _MEMBERS if member is None else (member,)
  found = [x for x in (_member(held, place) for place in places) if x]
  where = "at its top or under model, module, state_dict or trainer" if member is None else f"at member={member}"
  check(bool(found), "weights", path, f"must hold a dictionary of tensors by name and nothing else {where}")
  return data, dict(found[0])


def _member(held: Any, place: str) -> Mapping[str, Found] | None:
  """The dictionary of tensors at a dotted place, or None."""
  for name in place.split(".") if place else ():
    held = held.get(name) if isinstance(held, Mapping) else None
  ok = isinstance(held, Mapping) and all(isinstance(k, str) and isinstance(v, Found) for k, v in held.items())
  return held if ok else None


class _Unpickler(pickle.Unpickler):
  def __init__(self, program: bytes, path: pathlib.Path, members: Mapping[str, zipfile.ZipInfo], data: np.ndarray):
    super().__init__(io.BytesIO(program))
    self._path, self._members, self._data = path, members, data

  def find_class(self, module: str, name: str) -> Any:
    if module == "torch" and name in _STORAGES:
      return name
    # new functions for every call: a pickle may set attributes of what it was given
    known = {
      ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _tensor(*args),
      ("torch._utils", "_rebuild_parameter"): lambda tensor, requires_grad, hooks: tensor,
      ("collections", "OrderedDict"): collections.OrderedDict,
      ("argparse", "Namespace"): type("Options", (), {}),
    }
    check((module, name) in known, "weights", self._path, f"calls {module}.{name}, which tensors have no need of")
    return known[module, name]

  def persistent_load(self, pid: Any) -> _Storage:
    _, kind, key, _, _ = pid
    info = self._members[f"data/{key}"]
    if info.compress_type != zipfile.ZIP_STORED:
      raise ValueError(f"data/{key} is compressed")
    # the name and the extra field in front of the numbers may be longer than the directory at the end says
    lengths = self._data[info.header_offset + 26 : info.header_offset + _HEADER].view("<u2")
    start = info.header_offset + _HEADER + int(lengths.sum(dtype=int))
    end = start + info.file_size
    if end > self._data.size:
      raise ValueError(f"data/{key} is cut off")
    return _Storage(*_STORAGES[kind], start, end)


def _tensor(storage, offset, shape, stride, requires_grad=False, hooks=None, metadata=None) -> Found:
  del requires_grad, hooks, metadata
  contiguous = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
  if any(n != 1 and a != b for n, a, b in zip(shape, stride, contiguous, strict=True)):
    raise ValueError("holds a transposed or strided tensor")
  start = storage.start + offset * storage.size
  if min(*shape, offset, 0) < 0 or start + math.prod(shape) * storage.size > storage.end:
    raise ValueError("a tensor leaves its storage")
  return Found(storage.dtype, tuple(shape), start)
