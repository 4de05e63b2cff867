"""What the importer needs to know of a family of published models."""

from collections.abc import Callable, Mapping, Sequence, Set
import dataclasses
import math
from typing import Any

import numpy as np

from research.errors import check
from research.models.convert.files import Stored
from research.models.transformer import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a file and the part of a parameter that it is.

  file[key][rows].reshape(split).transpose(axes) is param[layer][at], the layer left out where
  it is None; `at` names a range along one axis of the layer's parameter, None: all of it.
  `rows` is a permutation, for what no reshape can order.
  """

  param: str  # dotted path in the model, e.g. blocks.attention.qkv
  shape: tuple[int, ...]  # in the file
  split: tuple[int, ...] | None = None
  axes: tuple[int, ...] | None = None
  layer: int | None = None
  at: tuple[int, int, int] | None = None  # (axis, start, stop)
  rows: Sequence[int] | None = None
  copy: bool = False  # may be absent: the same values stand in the file under another key

  def as_param(self, x: np.ndarray) -> np.ndarray:
    """A tensor as in the file -> the part of the parameter, a view unless there are `rows`."""
    x = x if self.rows is None else x[np.asarray(self.rows)]
    x = x if self.split is None else x.reshape(self.split)
    x = x if self.axes is None else x.transpose(self.axes)
    return x if self.layer is None else x[None]

  def as_file(self, param: np.ndarray) -> np.ndarray:
    """The whole parameter -> this tensor as in the file."""
    x = param[self.region(param.ndim)]
    x = x if self.layer is None else x[0]
    x = x if self.axes is None else x.transpose(np.argsort(self.axes))
    x = x.reshape(self.shape)
    return x if self.rows is None else x[np.argsort(self.rows)]

  def region(self, rank: int) -> tuple[slice, ...]:
    """Where in the parameter of that rank the part stands."""
    region = [slice(None)] * rank
    if self.layer is not None:
      region[0] = slice(self.layer, self.layer + 1)
    if self.at is not None:
      axis, start, stop = self.at
      region[axis + (self.layer is not None)] = slice(start, stop)
    return tuple(region)

  @property
  def size(self) -> int:
    return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Family:
  """Functions that say how a family's files and our models correspond.

  name: the `model_type` that exported files get.
  reads: (config.json, keys in the files) -> whether a directory is of this family.
  settings: config.json -> the fields of `Config` that the weights decide; the others are
    left to whoever loads them. Raises UserError for what the model does not have.
  tensors: (Config, config.json) -> {key in the files: Tensor}, in the order of the published files.
  make: (key, Config, partition) -> the model with random parameters.
  writes: model -> whether it is of this family.
  describe: Config -> config.json without dtype. Raises UserError for what the format cannot say.
  infer: tensors of the files -> what they say of config.json, which may be absent or leave it out.
  buffers: Config -> {key: values} of tensors that are no parameters: passed over, and written for
    code that asks for them.
  ignores: ends of further keys that are passed over.
  images: whether it knows images, and no text.
  """

  name: str
  reads: Callable[[Mapping[str, Any], Set[str]], bool]
  settings: Callable[[Mapping[str, Any]], dict[str, Any]]
  tensors: Callable[[Any, Mapping[str, Any]], dict[str, Tensor]]
  make: Callable[..., Any]
  writes: Callable[[Any], bool]
  describe: Callable[[Any], dict[str, Any]]
  Config: type = TransformerConfig
  infer: Callable[[Mapping[str, Stored]], dict[str, Any]] = lambda stored: {}
  buffers: Callable[[Any], dict[str, np.ndarray]] = lambda cfg: {}
  ignores: tuple[str, ...] = ()
  images: bool = False


def count(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
  """A positive whole number of config.json. Raises UserError."""
  value = config.get(name)
  value = default if value is None else value
  check(type(value) is int and 0 < value < 2**31, name, value, "must be a whole number of at least 1")
  return value
