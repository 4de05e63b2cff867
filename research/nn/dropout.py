"""What training leaves out at random."""

import jax
from jax import numpy as jnp

from research.kernels import dispatch
from research.mesh import row_spec


def dropout(key: jax.Array | None, x: jax.Array, rate: float) -> jax.Array:
  """x [batch, ...], each number 0 with probability `rate` and else divided by 1 - rate; `x` itself without a key."""
  return x if key is None or rate == 0 else _keep(key, x, rate, x.shape)


def drop_path(key: jax.Array | None, x: jax.Array, rate: jax.Array | float) -> jax.Array:
  """As `dropout` for whole rows of the batch (stochastic depth, Huang et al., 2016, arXiv 1603.09382)."""
  return x if key is None else _keep(key, x, rate, (x.shape[0], *[1] * (x.ndim - 1)))


def drop_labels(key: jax.Array | None, labels: jax.Array, rate: float, null: int) -> jax.Array:
  """labels int32 [batch], each `null` with probability `rate`: training for classifier-free guidance."""
  if key is None or rate == 0:
    return labels
  return jnp.where(_bernoulli(key, rate, labels.shape), null, labels)


def _keep(key, x, rate, shape):
  kept = _bernoulli(key, 1 - rate, shape)
  return jnp.where(kept, x / jnp.asarray(1 - rate, x.dtype), 0)


def _bernoulli(key, p, shape):
  spec = row_spec(len(shape)) if dispatch.on_mesh() else None
  return jax.random.bernoulli(key, p, shape, out_sharding=spec)
