"""The previous token of the same document."""

import jax
from jax import numpy as jnp


def shift(x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
  """Row t of the result is row t-1 of x, and zero where t starts a row or a document.

  x [batch, length, ...]; segment_ids int32 [batch, length] or None (one document a row).
  """
  before = lambda y: jnp.pad(y[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (y.ndim - 2))
  previous = before(x)
  if segment_ids is None:
    return previous
  # At a row's start this compares with 0, the id of padding; the row before it is zero anyway.
  same = before(segment_ids) == segment_ids
  # where, not a product: a product would carry NaN and Inf over the boundary
  return jnp.where(same.reshape(same.shape + (1,) * (x.ndim - 2)), previous, jnp.zeros((), x.dtype))
