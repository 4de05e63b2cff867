"""The previous token of the same document."""

import jax
from jax import numpy as jnp


def shift(x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
  """Row t of the result is row t-1 of x, and zero where t starts a row or a document.

  x [batch, length, ...]; segment_ids int32 [batch, length] or None (one document a row).
  """
  zero = jnp.zeros_like(x[:, :1])
  previous = jnp.concatenate([zero, x[:, :-1]], axis=1)
  if segment_ids is None:
    return previous
  same = segment_ids[:, 1:] == segment_ids[:, :-1]
  same = jnp.concatenate([jnp.zeros_like(same[:, :1]), same], axis=1)
  # where, not a product: a product would carry NaN and Inf over the boundary
  return jnp.where(same.reshape(same.shape + (1,) * (x.ndim - 2)), previous, jnp.zeros((), x.dtype))
