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
  power = (1 + jnp.arange(len(q), dtype=q.dtype))[:, None, None]  # [length, heads, 1], with the decay's
  states = jnp.cumsum((k * decay[:, None] ** -power)[..., None] * v[..., None, :], axis=0)
  return jnp.einsum("thk,thkv->thv", q * decay[:, None] ** power, states)


def overflows_at(decay: float) -> int:
  """The first token whose decay^-(t+1) is beyond the largest float32."""
  return math.floor(math.log(float(np.finfo(np.float32).max)) / -math.log(decay))


def errors(out: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """[length, heads]: the error of each token's output, nan where it is not finite; 1 is the heads' mean output.

  That mean (root mean square over tokens) is the measure because single outputs come near to zero by chance.
  """
  with np.errstate(invalid="ignore", over="ignore"):
    error = np.linalg.norm(np.float64(out) - truth, axis=-1)
  error /= np.sqrt((truth**2).sum(-1).mean(0))
  return np.where(np.isfinite(error), error, np.nan)
