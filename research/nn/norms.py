"""Normalisation layers."""

from flax import nnx
import jax
from jax import P
from jax import numpy as jnp

from research.nn.precision import Policy


class RMSNorm(nnx.Module):
  """x / rms(x) * scale over the last axis (Zhang & Sennrich, 2019), reduced in the policy's `reduce` dtype."""

  def __init__(self, width: int, eps: float, policy: Policy):
    self.scale = nnx.Param(jnp.ones(width, policy.params, out_sharding=P(None)))
    self.eps = eps
    self.policy = policy

  def __call__(self, x: jax.Array) -> jax.Array:
    """x [..., width] -> [..., width], same dtype."""
    y = x.astype(self.policy.reduce)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
    return (y * self.scale[...].astype(y.dtype)).astype(x.dtype)
