"""Which implementation of an op runs a call, and how the op stands on the mesh."""

from collections.abc import Callable
import math

import jax
from jax import P

from research.errors import check
from research.mesh import AXES, BATCH, row_spec


def platform() -> str:
  """ "cpu", "gpu" or "tpu": what the current mesh is made of.

  Never `jax.devices()[0]`: an ahead-of-time compile for a pod runs on a machine
  that has none of the pod's devices. The default backend answers only where no
  mesh is set, or an abstract one that does not say what it is made of.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def choose(implementation: str | None, obstacles: dict[str, str | None]) -> str:
  """The implementation to run.

  `obstacles` says of each implementation, best first, why it cannot run this call
  (None: it can). None chooses the first that can; naming one that cannot, or that
  does not exist, raises UserError with the reason.
  """
  if implementation is None:
    return next(name for name, why in obstacles.items() if why is None)
  check(implementation in obstacles, "implementation", implementation, f"use one of {', '.join(obstacles)}, or None")
  why = obstacles[implementation]
  check(why is None, "implementation", implementation, f"{why}; use None for the best that can run this call")
  return implementation


def on_mesh() -> bool:
  """Whether a mesh with this project's axes is set and the caller is not inside a shard_map over it."""
  mesh = jax.sharding.get_abstract_mesh()
  return set(AXES) <= set(mesh.axis_names) and not mesh.manual_axes


def axis_size(name: str) -> int:
  """Devices along the mesh axis `name`; 1 where the op does not stand on a mesh."""
  return jax.sharding.get_abstract_mesh().shape[name] if on_mesh() else 1


def batch_shards() -> int:
  """Slices in which the mesh cuts a batch; 1 where the op does not stand on a mesh."""
  return math.prod(map(axis_size, BATCH))


def place(x, spec: P):
  """`x` (an array or None) under `spec`, if a mesh is set: `per_shard` takes its operands as they stand."""
  return jax.reshard(x, spec) if on_mesh() and x is not None else x


def reshape_rows(x: jax.Array, *shape: int) -> jax.Array:
  """`x` [batch, ...] as [batch, *shape], of which only the batch is cut: plain reshapes refuse to guess that."""
  shape = (x.shape[0], *shape)
  return jax.lax.reshape(x, shape, out_sharding=row_spec(len(shape)) if on_mesh() else None)


def regroup_rows(x: jax.Array, *shape: int) -> jax.Array:
  """`x` [batch, ...] in another shape, of which the leading axis alone is cut, too: rows joined, or parted."""
  return jax.lax.reshape(place(x, row_spec(x.ndim)), shape, out_sharding=row_spec(len(shape)) if on_mesh() else None)


def per_shard(f: Callable, in_specs, out_specs) -> Callable:
  """`f` run by each device of the mesh on its shards; `f` itself where there is no mesh.

  Varying-axes checks are off because Mosaic kernels do not pass them. So autodiff
  may cross this border only if every operand is cut along every axis, or through a
  custom_vjp that stands outside.
  """
  if not on_mesh():
    return f
  return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)
