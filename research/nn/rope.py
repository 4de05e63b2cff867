"""Rotary position embedding."""

import dataclasses
import math
from typing import Literal

import jax
from jax import numpy as jnp

from research.errors import check


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How the frequencies are slowed for texts longer than those of pre-training. Raises UserError.

  linear: all by `factor` (Chen et al., 2023, arXiv 2306.15595).
  llama3: those that turn less than `low_frequency_factor` times in `original_length`
    positions by `factor`, those that turn more than `high_frequency_factor` times not at
    all, those between by a blend linear in the turns (Llama 3.1, arXiv 2407.21783).
  """

  kind: Literal["default", "linear", "llama3"] = "default"
  factor: float = 1.0
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  original_length: int = 8192

  def __post_init__(self):
    check(self.factor >= 1, "factor", self.factor, "must be at least 1")
    check(self.original_length >= 1, "original_length", self.original_length, "must be at least 1")
    low, high = self.low_frequency_factor, self.high_frequency_factor
    check(0 < low < high, "low_frequency_factor", low, f"must lie between 0 and high_frequency_factor={high}")

  def scale(self, inverse: jax.Array) -> jax.Array:
    """Radians a position -> the same, slowed."""
    if self.kind == "default":
      return inverse
    if self.kind == "linear":
      return inverse / self.factor
    turns = self.original_length * inverse / (2 * math.pi)
    low, high = self.low_frequency_factor, self.high_frequency_factor
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return kept * inverse + (1 - kept) * inverse / self.factor


def angles(
  positions: jax.Array, head_dim: int, base: float, scaling: RopeScaling = RopeScaling()
) -> tuple[jax.Array, jax.Array]:
  """(cos, sin), each float32 [batch, length, 1, head_dim / 2], of position / base^(2i / head_dim), scaled.

  positions: int32 [batch, length]. Source: Su et al., 2021 (arXiv 2104.09864), eq. 15.
  """
  inverse = scaling.scale(base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim))
  angle = positions[:, :, None, None].astype(jnp.float32) * inverse
  return jnp.cos(angle), jnp.sin(angle)


def grid_angles(positions: jax.Array, head_dim: int, base: float, side: int) -> tuple[jax.Array, jax.Array]:
  """(cos, sin), each float32 [batch, length, 1, head_dim / 2], of the cells of a square behind a class token.

  positions: int32 [batch, length]; t + 1 is cell (t // side, t % side). The first half of the pairs turns
  by the row, the other by the column, each at base^(-4i / head_dim). Position 0, the class, gets cos =
  sin = 0, as in LlamaGen (arXiv 2406.06525): its queries and keys are zero, not unrotated.
  """
  inverse = base ** (-jnp.arange(0, head_dim // 2, 2, dtype=jnp.float32) / (head_dim // 2))
  cell = positions[:, :, None, None] - 1
  angle = jnp.concatenate([(cell // side) * inverse, (cell % side) * inverse], axis=-1)
  return jnp.where(cell < 0, 0.0, jnp.cos(angle)), jnp.where(cell < 0, 0.0, jnp.sin(angle))


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the pairs (x_i, x_{i + head_dim/2}) of x [batch, length, heads, head_dim].

  The half-split pairing of the published Llama weights, not the interleaved one.
  """
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
