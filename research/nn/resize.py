"""Square maps up and down by matrices: what PyTorch's `interpolate` does, which `jax.image.resize` does not."""

import functools
import math

import jax
from jax import numpy as jnp
import numpy as np


@functools.cache
def area_matrix(n: int, to: int) -> np.ndarray:
  """float32 [to, n]: means over [floor(i n / to), ceil((i + 1) n / to)), which overlap unless `to` divides n."""
  matrix = np.zeros((to, n))
  for i in range(to):
    start, stop = i * n // to, math.ceil((i + 1) * n / to)
    matrix[i, start:stop] = 1 / (stop - start)
  return matrix.astype(np.float32)


@functools.cache
def bicubic_matrix(n: int, to: int) -> np.ndarray:
  """float32 [to, n]: cubic convolution with a = -0.75 (Keys, 1981; jax.image's is -0.5), edges repeated."""
  a = -0.75
  matrix = np.zeros((to, n))
  for i in range(to):
    at = (i + 0.5) * n / to - 0.5
    base = math.floor(at)
    for j in range(base - 1, base + 3):
      d = abs(at - j)
      near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
      matrix[i, min(max(j, 0), n - 1)] += near if d <= 1 else far
  return matrix.astype(np.float32)


def resize(x: jax.Array, matrix: np.ndarray) -> jax.Array:
  """x [batch, n, n, channels] under `matrix` [to, n] along both sides -> [batch, to, to, channels]."""
  return jnp.einsum("ih,bhwc,jw->bijc", matrix.astype(x.dtype), x, matrix.astype(x.dtype))
