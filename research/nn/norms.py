"""Normalisation layers, all over the last axis and reduced in the policy's `reduce` dtype.

The axis may be cut along a mesh axis: the reduction is over the whole of it, so the
result is that of one device.
"""

from flax import nnx
import jax
from jax import P
from jax import numpy as jnp

from research.nn.precision import Policy


class RMSNorm(nnx.Module):
  """x / rms(x) * scale (Zhang & Sennrich, 2019)."""

  def __init__(self, width: int, eps: float, policy: Policy):
    self.scale = nnx.Param(jnp.ones(width, policy.params, out_sharding=P(None)))
    self.eps = eps
    self.policy = policy

  def __call__(self, x: jax.Array) -> jax.Array:
    """x [..., width] -> [..., width], same dtype."""
    y = _over_rms(x.astype(self.policy.reduce), self.eps)
    return (y * self.scale[...].astype(y.dtype)).astype(x.dtype)


class SRMSNorm(nnx.Module):
  """x / rms(x), without parameters (TransNormerLLM, arXiv 2307.14995, equation 14)."""

  def __init__(self, width: int, eps: float, policy: Policy):
    self.width = width
    self.eps = eps
    self.policy = policy

  def __call__(self, x: jax.Array) -> jax.Array:
    """x [..., width] -> [..., width], same dtype."""
    return _over_rms(x.astype(self.policy.reduce), self.eps).astype(x.dtype)

  def factor(self, squares: jax.Array) -> jax.Array:
    """What it multiplies x by, from the sum of the squares of x over the last axis."""
    return jax.lax.rsqrt(squares.astype(self.policy.reduce) / self.width + self.eps)


class LayerNorm(nnx.Module):
  """(x - mean) / deviation * scale + bias (Ba et al., 2016)."""

  def __init__(self, width: int, eps: float, policy: Policy):
    self.scale = nnx.Param(jnp.ones(width, policy.params, out_sharding=P(None)))
    self.bias = nnx.Param(jnp.zeros(width, policy.params, out_sharding=P(None)))
    self.eps = eps
    self.policy = policy

  def __call__(self, x: jax.Array) -> jax.Array:
    """x [..., width] -> [..., width], same dtype."""
    y = _standardized(x.astype(self.policy.reduce), self.eps)
    return (y * self.scale[...].astype(y.dtype) + self.bias[...].astype(y.dtype)).astype(x.dtype)


NORMS = {"srms": SRMSNorm, "rms": RMSNorm, "layer": LayerNorm}


def standardize(x: jax.Array, eps: float, policy: Policy) -> jax.Array:
  """(x - mean) / deviation over the last axis: LayerNorm without parameters."""
  return _standardized(x.astype(policy.reduce), eps).astype(x.dtype)


def unit(x: jax.Array) -> jax.Array:
  """x / max(|x|, 1e-12) over the last axis."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def _standardized(x, eps):
  return _over_rms(x - jnp.mean(x, axis=-1, keepdims=True), eps)


def _over_rms(x, eps):
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
