"""Two ways to decode linear attention with decay, which are equal on paper: one overflows, one does not.

arXiv 2307.14995, on robust inference (there algorithms 1 and 2, proved equal by induction).
Tokens count from 0 here, so token t meets decay^(t+1).
"""

import math

import jax
from jax import numpy as jnp
import numpy as np


def naive(q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array) -> jax.Array:
  """S_t = S_{t-1} + k_t decay^-(t+1) v_t^T, o_t = q_t decay^(t+1) S_t: one factor vanishes, the other overflows.

  q, k: [length, heads, d_k]. v: [length, heads, d_v]. decay: [heads]. -> [length, heads, d_v]. All of one dtype.
  """
  power = decay ** (1 + jnp.arange(len(q), dtype=q.dtype))[:, None]  # [length, heads]
  states = jnp.cumsum((k / power[..., None])[..., :, None] * v[..., None, :], axis=0)
  return jnp.einsum("thk,thkv->thv", q * power[..., None], states)


def overflows_at(decay: float, dtype: str = "float32") -> int:
  """The first token whose decay^-(t+1) is beyond the largest number of `dtype`."""
  return math.floor(math.log(float(np.finfo(dtype).max)) / -math.log(decay))


def errors(out: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """[length, heads]: the error of each token's output relative to its norm; nan where it is not finite."""
  with np.errstate(invalid="ignore", over="ignore"):
    error = np.linalg.norm(np.float64(out) - truth, axis=-1) / np.linalg.norm(truth, axis=-1)
  return np.where(np.isfinite(error), error, np.nan)
