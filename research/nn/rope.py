"""Rotary position embedding."""

import jax
from jax import numpy as jnp


def angles(positions: jax.Array, head_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
  """(cos, sin), each float32 [batch, length, 1, head_dim / 2], of position / base^(2i / head_dim).

  positions: int32 [batch, length]. Source: Su et al., 2021 (arXiv 2104.09864), eq. 15.
  """
  inverse = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angle = positions[:, :, None, None].astype(jnp.float32) * inverse
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the pairs (x_i, x_{i + head_dim/2}) of x [batch, length, heads, head_dim].

  The half-split pairing of the published Llama weights, not the interleaved one.
  """
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
