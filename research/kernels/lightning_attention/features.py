"""What queries and keys go through before they meet: activations by name, and learnt phases."""

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
