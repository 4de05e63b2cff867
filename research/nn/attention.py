"""Grouped-query self-attention with rotary positions."""

from collections.abc import Callable

from flax import nnx
import jax
from jax import numpy as jnp

from research.kernels.attention.api import attention
from research.mesh import HIDDEN, Partition
from research.nn import rope
from research.nn.init import fan_in
from research.nn.norms import RMSNorm
from research.nn.precision import Policy


class Attention(nnx.Module):
  """Causal self-attention inside each document; heads grouped by the key-value head they share.

  The projections of q, k and v are one matrix [width, kv_heads, group + 2, head_dim]:
  the `group` queries of a key-value head, then its key, then its value, so that
  cutting kv_heads along the mesh axis `model` keeps every group whole.

  `mix` is the seam for papers that change keys, values or queries: a function
  (a module) of (q, k, v, segment_ids) applied to the raw projections, before
  normalisation and rotation.
  """

  def __init__(
    self,
    key: jax.Array,
    *,
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rope_base: float,
    rope_scaling: rope.RopeScaling,
    out_scale: float,
    qk_norm_eps: float | None,
    partition: Partition,
    policy: Policy,
    mix: Callable | None = None,
    implementation: str | None = None,
  ):
    qkv_key, out_key = jax.random.split(key)
    group = heads // kv_heads
    shape = (width, kv_heads, group + 2, head_dim)
    self.qkv = nnx.Param(
      fan_in(qkv_key, shape, width, policy.params, partition.qkv), matrix=((-4,), (-1,))
    )  # for Muon every head is a matrix of its own
    shape = (kv_heads, group, head_dim, width)
    self.out = nnx.Param(
      fan_in(out_key, shape, heads * head_dim, policy.params, partition.out, out_scale),
      matrix=((-4, -3, -2), (-1,)),
    )
    self.q_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps, policy)
    self.k_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps, policy)
    self.mix = mix
    self.rope_base, self.rope_scaling = rope_base, rope_scaling
    self.group, self.implementation, self.policy = group, implementation, policy

  def __call__(self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """x [batch, length, width]; segment_ids, positions int32 [batch, length] -> [batch, length, width]."""
    batch, length, _ = x.shape
    y = jnp.einsum("btd,dkgh->btkgh", x, self.policy.weight(self.qkv[...]))
    # split, not indexing: its transpose is one concatenation instead of padded sums
    q, k, v = jnp.split(y, [self.group, self.group + 1], axis=3)
    q, k, v = (z.reshape(batch, length, -1, z.shape[-1]) for z in (q, k, v))
    if self.mix is not None:
      q, k, v = self.mix(q, k, v, segment_ids)
    if self.q_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    cos, sin = rope.angles(positions, q.shape[-1], self.rope_base, self.rope_scaling)
    q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
    y = attention(q, k, v, segment_ids=segment_ids, implementation=self.implementation)
    y = y.reshape(batch, length, k.shape[2], self.group, -1)
    return jnp.einsum("btkgh,kghd->btd", y, self.policy.weight(self.out[...]), out_sharding=HIDDEN)
