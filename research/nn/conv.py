"""The convolutional encoder and decoder of VQGAN (Esser et al., 2021, arXiv 2012.09841), images as NHWC.

Batches are cut along the mesh's batch axes. The parameters stand whole on every device, in every
partition: they are few, and the last layer's three channels divide by nothing.
"""

from flax import nnx
import jax
from jax import P
from jax import numpy as jnp

from research.kernels.dispatch import reshape_rows
from research.mesh import BATCH
from research.nn.init import fan_in
from research.nn.precision import Policy

IMAGES = P(BATCH, None, None, None)  # [batch, height, width, channels]
GROUPS, EPS = 32, 1e-6  # of every group norm


class Conv(nnx.Module):
  """A convolution with bias that keeps the size of the map; with stride 2 it halves it, padding below and right."""

  def __init__(self, key: jax.Array, channels: int, to: int, policy: Policy, size: int = 3, stride: int = 1):
    fan = size * size * channels
    self.kernel = nnx.Param(
      fan_in(key, (size, size, channels, to), fan, policy.params, P(None, None, None, None)),
      matrix=((-4, -3, -2), (-1,)),
    )
    self.bias = nnx.Param(jnp.zeros(to, policy.params, out_sharding=P(None)))
    self.stride, self.policy = stride, policy

  def __call__(self, x: jax.Array) -> jax.Array:
    """x [batch, height, width, channels] -> [batch, height / stride, width / stride, to]."""
    y = jax.lax.conv_general_dilated(
      x.astype(self.policy.compute),
      self.policy.weight(self.kernel[...]),
      (self.stride,) * 2,
      "SAME" if self.stride == 1 else ((0, 1), (0, 1)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + self.policy.weight(self.bias[...])


class GroupNorm(nnx.Module):
  """(x - mean) / deviation over a map and the channels of a group, then * scale + bias (Wu & He, 2018)."""

  def __init__(self, channels: int, policy: Policy):
    self.scale = nnx.Param(jnp.ones(channels, policy.params, out_sharding=P(None)))
    self.bias = nnx.Param(jnp.zeros(channels, policy.params, out_sharding=P(None)))
    self.policy = policy

  def __call__(self, x: jax.Array) -> jax.Array:
    """x [batch, height, width, channels] -> the same shape and dtype."""
    _, height, width, channels = x.shape
    y = reshape_rows(x.astype(self.policy.reduce), height * width, GROUPS, channels // GROUPS)
    y = y - jnp.mean(y, axis=(1, 3), keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=(1, 3), keepdims=True) + EPS)
    y = reshape_rows(y, height, width, channels) * self.scale[...].astype(y.dtype) + self.bias[...].astype(y.dtype)
    return y.astype(x.dtype)


class ResBlock(nnx.Module):
  """Two convolutions, each after a norm and a swish, added to the input, which a 1 x 1 fits where channels change."""

  def __init__(self, key: jax.Array, channels: int, to: int, policy: Policy):
    keys = jax.random.split(key, 3)
    self.norm1, self.norm2 = GroupNorm(channels, policy), GroupNorm(to, policy)
    self.conv1, self.conv2 = Conv(keys[0], channels, to, policy), Conv(keys[1], to, to, policy)
    self.shortcut = None if channels == to else Conv(keys[2], channels, to, policy, size=1)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = self.conv1(jax.nn.silu(self.norm1(x)))
    y = self.conv2(jax.nn.silu(self.norm2(y)))
    return (x if self.shortcut is None else self.shortcut(x)) + y


class MapAttention(nnx.Module):
  """x + attention(norm(x)) of every cell to every cell, with one head as wide as the map has channels."""

  def __init__(self, key: jax.Array, channels: int, policy: Policy):
    qkv_key, out_key = jax.random.split(key)
    shape = (channels, 3, channels)
    self.norm = GroupNorm(channels, policy)
    self.qkv = nnx.Param(fan_in(qkv_key, shape, channels, policy.params, P(None, None, None)), matrix=((-3,), (-1,)))
    self.qkv_bias = nnx.Param(jnp.zeros(shape[1:], policy.params, out_sharding=P(None, None)))
    self.out = Conv(out_key, channels, channels, policy, size=1)
    self.policy = policy

  def __call__(self, x: jax.Array) -> jax.Array:
    _, height, width, channels = x.shape
    y = reshape_rows(self.norm(x).astype(self.policy.compute), height * width, channels)
    y = jnp.einsum("btc,cnd->btnd", y, self.policy.weight(self.qkv[...])) + self.policy.weight(self.qkv_bias[...])
    q, k, v = (jnp.squeeze(z, 2) for z in jnp.split(y, 3, axis=2))
    scores = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=self.policy.reduce) * channels**-0.5
    y = jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    return x + self.out(reshape_rows(y, height, width, channels))


class Level(nnx.Module):
  """Blocks at one resolution, each with attention at the lowest, then a change to the next resolution."""

  def __init__(self, key, channels: int, to: int, blocks: int, attention: bool, resample: str | None, policy: Policy):
    keys = jax.random.split(key, 2 * blocks + 1)
    sizes = [channels, *[to] * blocks]
    self.res = nnx.List([ResBlock(keys[i], sizes[i], to, policy) for i in range(blocks)])
    self.attention = nnx.List([MapAttention(keys[blocks + i], to, policy) for i in range(blocks if attention else 0)])
    stride = 2 if resample == "down" else 1
    self.conv = None if resample is None else Conv(keys[-1], to, to, policy, stride=stride)
    self.up = resample == "up"

  def __call__(self, x: jax.Array) -> jax.Array:
    for i, res in enumerate(self.res):
      x = res(x)
      if len(self.attention):
        x = self.attention[i](x)
    if self.up:
      x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return x if self.conv is None else self.conv(x)


class Stack(nnx.Module):
  """An encoder or a decoder: from channels in to channels out, through `levels`, with `middle` at the lowest one."""

  def __init__(
    self, key, channels: int, to: int, base: int, mult: tuple[int, ...], blocks: int, up: bool, policy: Policy
  ):
    keys = jax.random.split(key, len(mult) + 5)
    sizes = [base * m for m in mult]
    sizes = [sizes[-1], *sizes[::-1]] if up else [base, *sizes]  # in, then of each level in order
    lowest = sizes[0] if up else sizes[-1]
    self.conv_in = Conv(keys[0], channels, sizes[0], policy)
    self.middle = nnx.List(
      [
        ResBlock(keys[1], lowest, lowest, policy),
        MapAttention(keys[2], lowest, policy),
        ResBlock(keys[3], lowest, lowest, policy),
      ]
    )
    last, way = len(mult) - 1, "up" if up else "down"
    self.levels = nnx.List(
      [
        Level(keys[5 + i], sizes[i], sizes[i + 1], blocks, i == (0 if up else last), None if i == last else way, policy)
        for i in range(len(mult))
      ]
    )
    self.norm_out = GroupNorm(sizes[-1], policy)
    self.conv_out = Conv(keys[4], sizes[-1], to, policy)
    self.up = up

  def __call__(self, x: jax.Array) -> jax.Array:
    """x [batch, height, width, channels] -> [batch, height', width', to]; all levels but the last halve or double."""
    x = self.conv_in(x)
    for part in (*self.middle, *self.levels) if self.up else (*self.levels, *self.middle):
      x = part(x)
    return self.conv_out(jax.nn.silu(self.norm_out(x)))
