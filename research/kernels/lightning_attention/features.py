"""What queries and keys go through before they meet: activations by name, and learnt phases."""

import functools
import math

import jax
import jax.numpy as jnp

ACTIVATIONS = {
  "silu": jax.nn.silu,
  "1+elu": lambda x: jnp.where(x > 0, 1 + x, jnp.exp(jnp.minimum(x, 0))),
  "none": lambda x: x,
}


def activate(name: str, x: jax.Array) -> jax.Array:
  """ACTIVATIONS[name] of x, at least in float32, in x's dtype."""
  return ACTIVATIONS[name](x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


def phases(x: jax.Array, positions: jax.Array, theta: jax.Array) -> jax.Array:
  """LRPE: x [batch, length, heads, d] -> [x cos(theta t), x sin(theta t)] [..., 2 d], in x's dtype.

  With both q and k so, q_t . k_s becomes sum_j q_tj k_sj cos(theta_j (t - s)); TransNormerLLM (arXiv
  2307.14995), equation 9. positions: int32 [batch, length]. theta: radians a position, [heads, d].
  """
  angle = positions[:, :, None, None].astype(theta.dtype) * theta
  return jnp.concatenate([x * jnp.cos(angle), x * jnp.sin(angle)], axis=-1).astype(x.dtype)


def sin_cos(angle):
  """Both, of float32, by one reduction to a quarter turn (Cody & Waite, 1980) and Taylor's series.

  As exact as the angle itself up to 10^5 radians, for a quarter of what jnp.sin and jnp.cos take.
  """
  # a quarter turn in parts of so few digits that a multiple of the first two is exact
  first = 201 / 128
  second = round((math.pi / 2 - first) * 2**22) / 2**22
  third = math.pi / 2 - first - second
  turns = jnp.floor(angle * (2 / math.pi) + 0.5)
  x = ((angle - turns * first) - turns * second) - turns * third
  square = x * x
  series = lambda top: functools.reduce(lambda y, n: 1 - y * square * (1 / (n * (n - 1))), range(top, 1, -2), 1.0)
  sin, cos = x * series(9), series(8)
  quarter = turns.astype(jnp.int32)
  swapped = (quarter & 1) == 1
  sin, cos = jnp.where(swapped, cos, sin), jnp.where(swapped, sin, cos)
  return jnp.where((quarter & 2) == 2, -sin, sin), jnp.where(((quarter + 1) & 2) == 2, -cos, cos)
