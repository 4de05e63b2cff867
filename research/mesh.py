"""Device meshes with explicit axes, the named PartitionSpecs of the zoo, and how arrays come to stand under them.

Axes: `replica` (pure data parallelism, between slices), `data` (data parallelism
whose members also share the parameters: FSDP), `model` (tensor parallelism).
Batches are cut along `replica` x `data`.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any, Literal

import jax
from jax import P
import numpy as np

from research.errors import UserError, check

AXES = ("replica", "data", "model")
BATCH = ("replica", "data")  # the mesh axes that the batch axis is cut along

# Activations stand under the same specs in every partition.
TOKENS = P(BATCH, None)  # [batch, length]
HIDDEN = P(BATCH, None, None)  # [batch, length, width]


def row_spec(ndim: int) -> P:
  """Of an array [batch, ...] whose batch is cut, and nothing else."""
  return P(BATCH, *[None] * (ndim - 1))


@dataclasses.dataclass(frozen=True)
class Partition:
  """Where each kind of parameter is cut; names are roles, not layers.

  A weight is kept under its spec and gathered along `data` for use
  (`gathered`); the transpose of that gather is the gradients' reduce-scatter.
  """

  vector: P  # [width]: norms, biases
  per_head: P  # [kv_heads, ...]: a few numbers a head
  embed: P  # [vocab, width]
  head: P  # [width, vocab]
  qkv: P  # [width, kv_heads, group + 2, head_dim]
  out: P  # [kv_heads, group, head_dim, width]
  up: P  # [width, 2, hidden]
  down: P  # [hidden, width]


def _partition(data: str | None, model: str | None) -> Partition:
  return Partition(
    vector=P(None),
    per_head=P(model, None),
    embed=P(model, data),
    head=P(data, model),
    qkv=P(data, model, None, None),
    out=P(model, None, None, data),
    up=P(data, None, model),
    down=P(model, data),
  )


def replicated() -> Partition:
  """Every device holds every parameter."""
  return _partition(None, None)


def fsdp() -> Partition:
  """Parameters cut along `data`."""
  return _partition("data", None)


def fsdp_tp() -> Partition:
  """Parameters cut along `data` and, by heads, hidden units and vocabulary, along `model`."""
  return _partition("data", "model")


PARTITIONS = {"replicated": replicated, "fsdp": fsdp, "fsdp_tp": fsdp_tp}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The mesh's shape (-1: what the other axes leave) and the parameters' partition."""

  replica: int = 1
  data: int = -1
  model: int = 1
  partition: Literal["replicated", "fsdp", "fsdp_tp"] = "fsdp_tp"

  def __post_init__(self):
    shape = {axis: getattr(self, axis) for axis in AXES}
    for axis, size in shape.items():
      check(size == -1 or size >= 1, axis, size, "use a positive number, or -1 for the devices that are left")
    free = [axis for axis, size in shape.items() if size == -1]
    check(len(free) <= 1, "+".join(free), -1, "only one axis can take the devices that are left")
    check(
      self.model == 1 or self.partition == "fsdp_tp",
      "model",
      self.model,
      f"partition={self.partition} leaves the model axis idle; set partition=fsdp_tp or model=1",
    )


def axis_sizes(cfg: MeshConfig, n_devices: int) -> dict[str, int]:
  """The size of each axis on `n_devices`. Raises UserError when they do not match."""
  sizes = {axis: getattr(cfg, axis) for axis in AXES}
  fixed = math.prod(size for size in sizes.values() if size != -1)
  for axis, size in sizes.items():
    if size == -1:
      sizes[axis] = max(n_devices // fixed, 1)
  total = math.prod(sizes.values())
  if total != n_devices:
    shape = "x".join(str(getattr(cfg, axis)) for axis in AXES)
    raise UserError(
      "mesh.replica x data x model",
      shape,
      f"needs {total} devices and there are {n_devices}; change the mesh"
      " (on a CPU, JAX_NUM_CPU_DEVICES=N makes N devices)",
    )
  return sizes


def least_devices(cfg: MeshConfig) -> int:
  """The fewest devices that `cfg` fits: axes that take what is left take one."""
  return math.prod(max(getattr(cfg, axis), 1) for axis in AXES)


def make_mesh(cfg: MeshConfig, devices=None) -> jax.sharding.Mesh:
  """A mesh with explicit axes over `devices` (default: all). Raises UserError on a misfit."""
  devices = jax.devices() if devices is None else devices
  sizes = axis_sizes(cfg, len(devices))
  return jax.make_mesh(tuple(sizes.values()), AXES, devices=devices)


def abstract_mesh(cfg: MeshConfig, n_devices: int = 1) -> jax.sharding.AbstractMesh:
  """The same mesh without devices, for tracing a config of any size anywhere."""
  sizes = axis_sizes(cfg, n_devices)
  return jax.sharding.AbstractMesh(
    tuple(sizes.values()), AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES)
  )


def shapes_of(make: Callable[[jax.Array], Any]) -> Any:
  """What `make(key)` gives, as ShapeDtypeStructs; nothing is allocated."""
  return jax.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0)))


def on_devices(tree: Any) -> Any:
  """Abstract arrays, as of `shapes_of`, on the devices of the current mesh instead of an abstract one."""
  mesh = jax.sharding.get_mesh()
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, x.sharding.spec))
  return jax.tree.map(place, tree)


def to_devices(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """This process's rows as global arrays cut along the batch axes of the current mesh."""
  mesh = jax.sharding.get_mesh()
  place = lambda x: jax.make_array_from_process_local_data(jax.NamedSharding(mesh, row_spec(x.ndim)), np.asarray(x))
  return {name: place(x) for name, x in batch.items()}


def gathered(spec: P) -> P:
  """`spec` without the `data` axis: how a weight stands while it is used."""
  return P(*(None if axis == "data" else axis for axis in spec))


def batch_shard(mesh: jax.sharding.Mesh, process_index: int | None = None) -> tuple[int, int]:
  """(index, count): which of `count` equal slices of the batch this process loads.

  Derived from where the process's devices stand on the mesh's batch axes, so
  processes that differ only along `model` load the same rows. A mesh for which
  "the rows of one process" is not one slice of equal size raises UserError:
  jax would accept different data for one replica and silently diverge.
  """
  process_index = jax.process_index() if process_index is None else process_index
  owners = np.vectorize(lambda d: d.process_index)(mesh.devices)
  rows = owners.reshape(mesh.shape["replica"] * mesh.shape["data"], mesh.shape["model"])
  held = {p: np.flatnonzero((rows == p).any(axis=1)) for p in np.unique(rows)}
  mine = held.get(process_index, np.array([], int))
  size = len(mine)
  ok = size > 0 and all(len(h) == size and h[0] % size == 0 and h[-1] - h[0] == size - 1 for h in held.values())
  check(
    ok,
    "mesh",
    dict(mesh.shape),
    f"process {process_index} does not hold one equal slice of the batch axes;"
    " let replica x data be a multiple of the process count, or model span whole processes",
  )
  return int(mine[0]) // size, len(rows) // size
