"""Reads and writes published weights: directories of `config.json` and safetensors files.

Language models: `llama` and `transnormer`, and `FAMILY` of every `experiments/*/convert.py`.
Of images: `llamagen`, `var` and the tokenizers of both, whose released files stand without a config.json.
"""

from collections.abc import Mapping
import dataclasses
import functools
import importlib
import os
import pathlib
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from research.errors import UserError, check
from research.markdown import table
from research.mesh import on_devices, shapes_of
from research.models.convert import image_tokenizers, llama, llamagen, transnormer, var
from research.models.convert.family import Family, Tensor
from research.models.convert.files import DTYPES, Stored, is_weights, open_tensors, read_json, write

__all__ = ["Family", "Tensor", "Weights", "export", "families", "is_weights", "load", "read"]

_ROWS = 40  # of a table of differences


@dataclasses.dataclass(frozen=True)
class Weights:
  """A directory of weights that fits its family; the tensors are still on the disk."""

  directory: pathlib.Path
  family: Family
  config: Mapping[str, Any]  # config.json
  settings: Mapping[str, Any]  # what it decides of the model's config
  stored: Mapping[str, Stored]

  @property
  def tensors(self) -> dict[str, Tensor]:
    """Where every tensor of the directory stands in the model."""
    found = self.family.tensors(self.family.Config(**self.settings), self.config)
    return {key: tensor for key, tensor in found.items() if key in self.stored}

  def check_model(self, model: Any) -> None:
    """Raises UserError with a table unless `model`, which may be abstract, takes exactly these weights."""
    theirs = {name: getattr(getattr(model, "cfg", None), name, "absent") for name in self.settings}
    rows = [(f"model.{name}", x, theirs[name]) for name, x in self.settings.items() if theirs[name] != x]
    make = functools.partial(self.family.make, cfg=self.family.Config(**self.settings), partition="replicated")
    here = _shapes(shapes_of(make))
    there = _shapes(model)
    if not rows:  # else the shapes differ for that very reason
      for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
          rows.append((name, here.get(name, "absent"), there.get(name, "absent")))
    _check_rows(rows, self.directory, "are of another model than this run's", ["", "weights", "run"])

  def fill(self, model: Any) -> Any:
    """`model`, which may be abstract, with these parameters, each put straight where its sharding says.

    Of the host's memory it takes one parameter at a time beside the result, put together layer by layer.
    """
    parts: dict[str, list[tuple[Tensor, Stored]]] = {}
    for key, tensor in self.tensors.items():
      if not tensor.copy:
        parts.setdefault(tensor.param, []).append((tensor, self.stored[key]))

    def place(path, x):
      block = functools.partial(_block, parts[_name(path)], x.shape, x.dtype)
      return jax.make_array_from_callback(x.shape, x.sharding, block)

    return jax.tree_util.tree_map_with_path(place, model)


def families() -> list[Family]:
  """The experiments' own, then those of the library: the first that reads a directory has it."""
  root = pathlib.Path(__file__).resolve().parents[3] / "experiments"
  names = sorted(p.parent.name for p in root.glob("*/convert.py"))
  theirs = [importlib.import_module(f"experiments.{name}.convert").FAMILY for name in names]
  tokenizers = (image_tokenizers.VQ_FAMILY, image_tokenizers.VQVAE_FAMILY)
  return [*theirs, llama.FAMILY, transnormer.FAMILY, llamagen.FAMILY, var.FAMILY, *tokenizers]


def read(
  directory: str | os.PathLike, settings: Mapping[str, Any] | None = None, member: str | None = None, like: Any = None
) -> Weights:
  """Opens a directory of weights, or one file, and checks every key, shape and dtype; reads no tensor.

  settings: entries that stand for those of config.json, e.g. the names of a family's
  own tensors. member: where in a checkpoint of PyTorch's the tensors are, e.g. trainer.vae_local;
  default: where the released ones have the model. like: a model, which may be abstract, that stands for
  what neither tensors nor config.json say. Raises UserError for what is wrong, with a table of what differs.
  """
  directory = pathlib.Path(directory)
  fix = "no such directory; give one with config.json and model.safetensors, or a file"
  check(directory.exists(), "weights", directory, fix)
  stored = open_tensors(directory, member)
  config, said = dict(settings or {}), directory / "config.json" if directory.is_dir() else directory
  # the keys of some families say enough
  if directory.is_dir() and (said.exists() or not any(f.reads(config, stored.keys()) for f in families())):
    config = read_json(said) | config
  try:
    family = next((f for f in families() if f.reads(config, stored.keys())), None)
    known = ", ".join(sorted(f.name for f in families()))
    check(family is not None, "model_type", config.get("model_type"), f"cannot be read; choose from {known}")
    inferred = {name: value for name, value in family.infer(stored).items() if value is not None}
    assumed = family.describe(like.cfg) if like is not None and family.writes(like) else {}
    config = assumed | inferred | config
    decided = family.settings(config)
    cfg = family.Config(**decided)
    expected, buffers = family.tensors(cfg, config), family.buffers(cfg)
  except UserError as e:
    raise UserError(f"{said}: {e.field}", e.value, e.fix) from None
  stored = {key: x for key, x in stored.items() if key not in buffers and not key.endswith(family.ignores)}
  rows = []
  for key in sorted(stored.keys() | expected.keys()):
    x, tensor = stored.get(key), expected.get(key)
    if tensor is None:
      rows.append((key, x, "absent"))
    elif x is None and not tensor.copy:
      rows.append((key, "absent", list(tensor.shape)))
    elif x is not None and (x.shape != tensor.shape or x.dtype not in DTYPES):
      rows.append((key, x, f"{' or '.join(DTYPES)} {list(tensor.shape)}"))
  if not rows:
    rows = [(key, "other values", f"those of {twin}") for key, twin in _copies(stored, expected) if key != twin]
  _check_rows(
    rows, directory, f"are not those of a {family.name} model as config.json has it", ["key", "in file", "expected"]
  )
  return Weights(directory, family, config, decided, stored)


def load(weights: str | os.PathLike | Weights, partition: str = "replicated", **execution: Any) -> tuple[Any, Any]:
  """(config, model) of a directory of weights, under the current mesh. Raises UserError.

  execution: the fields of the model's config that weights do not decide, e.g. precision="float32".
  """
  weights = weights if isinstance(weights, Weights) else read(weights)
  cfg = weights.family.Config(**weights.settings, **execution)
  cfg.check_mesh(dict(jax.sharding.get_abstract_mesh().shape), partition)
  make = functools.partial(weights.family.make, cfg=cfg, partition=partition)
  return cfg, weights.fill(on_devices(shapes_of(make)))


def export(
  model: Any,
  directory: str | os.PathLike,
  *,
  like: Weights | None = None,
  settings: Mapping[str, Any] | None = None,
  dtype: str | None = None,
  shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes a model as a directory that transformers reads: config.json and one or more safetensors files.

  like: the weights that the model came from. What their config.json says beside the model, their
    names and their dtypes are kept; without it, dtypes are float32.
  settings: further entries of config.json; the model's own win.
  dtype: float32, bfloat16 or float16, for all tensors.
  shard_bytes: the most bytes of tensors a file.

  Raises UserError for a model of no family, a value that `dtype` cannot hold, a directory that is not empty.
  """
  names = {str(kind): kind for kind in DTYPES.values()}
  check(dtype is None or dtype in names, "dtype", dtype, f"choose from {', '.join(names)}")
  check(jax.process_count() == 1, "processes", jax.process_count(), "weights are exported by one process")
  family = next((f for f in families() if f.writes(model)), None)
  check(
    family is not None,
    "model",
    type(model).__name__,
    f"is of no family that can be exported; those are {', '.join(f.name for f in families())}",
  )
  config = {**(like.config if like else {}), **(settings or {}), **family.describe(model.cfg)}
  kept = config.get("dtype", config.get("torch_dtype", "float32"))
  config["dtype"] = config["torch_dtype"] = dtype or kept
  tensors = family.tensors(model.cfg, config)
  held = like.stored if like else {}
  tensors = {key: tensor for key, tensor in tensors.items() if not tensor.copy or key in held}
  buffers = family.buffers(model.cfg)
  kinds = {key: names[dtype] if dtype else _kind(held.get(key)) for key in tensors}
  params = {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(model)}

  @functools.lru_cache(1)  # neighbours in the order of the files often share a layer
  def layer(name, i):
    return jax.device_get(params[name] if i is None else params[name][i : i + 1])

  def tensor(key):
    if key in buffers:
      return buffers[key]
    t = tensors[key]
    whole = dataclasses.replace(t, layer=None if t.layer is None else 0)
    x = whole.as_file(layer(t.param, t.layer))
    with np.errstate(over="ignore"):  # told below
      y = x.astype(kinds[key])
    fits = bool(np.isfinite(y.astype(np.float32)).all()) or not np.isfinite(x).all()
    check(fits, "dtype", kinds[key], f"is too small for the values of {key}; use bfloat16 or float32")
    return y

  sizes = {key: t.size * kinds[key].itemsize for key, t in tensors.items()}
  sizes |= {key: x.nbytes for key, x in buffers.items()}
  write(pathlib.Path(directory), config, sizes, tensor, shard_bytes)


def _kind(stored: Stored | None) -> np.dtype:
  return np.dtype(jnp.float32) if stored is None else DTYPES[stored.dtype]


def _block(parts, shape, dtype, index) -> np.ndarray:
  """The block `index` of a parameter of that shape, put together from the files."""
  index = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
  block = np.empty([stop - start for start, stop in index], dtype)
  for tensor, stored in parts:
    region = [s.indices(n)[:2] for s, n in zip(tensor.region(len(shape)), shape, strict=True)]
    common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(index, region, strict=True)]
    if all(a < b for a, b in common):
      to = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, index, strict=True))
      of = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, region, strict=True))
      block[to] = tensor.as_param(stored.view())[of]
  return block


def _copies(stored, expected):
  """The (key, key) of tensors that should be copies of each other, in the file, and are not."""
  for key, tensor in expected.items():
    if tensor.copy and key in stored:
      twin = next(k for k, t in expected.items() if t.param == tensor.param and not t.copy)
      if not np.array_equal(stored[key].view(), stored[twin].view()):
        yield key, twin


def _shapes(model) -> dict[str, list[int]]:
  return {_name(path): list(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(model)}


def _name(path) -> str:
  return jax.tree_util.keystr(path[:-1], simple=True, separator=".")


def _check_rows(rows, directory, what, header) -> None:
  if rows:
    more = [(f"and {len(rows) - _ROWS} more", "", "")] if len(rows) > _ROWS else []
    raise UserError("weights", directory, f"{what}:\n\n{table(header, rows[:_ROWS] + more)}")
