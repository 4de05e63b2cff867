"""Grouped-query self-attention with rotary positions."""

from collections.abc import Callable
import dataclasses
import functools

from flax import nnx
import jax
from jax import P
from jax import numpy as jnp

from research.kernels import dispatch
from research.kernels.attention.api import HEADS, attention, attention_weights, cached_attention
from research.mesh import HIDDEN, TOKENS, Partition
from research.nn import rope
from research.nn.init import fan_in
from research.nn.norms import RMSNorm
from research.nn.precision import Policy


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["k", "v", "raw", "recent", "segment_ids", "length"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Cache:
  """What a stack of attention layers keeps of the tokens so far.

  k, v: [layers, batch, capacity, kv_heads, head_dim], as attention reads them: mixed and rotated.
  raw: of "q", "k" and "v" those that the mix looks back at: their last raw projections,
    [layers, batch, rows, heads, head_dim].
  recent: int32 [batch, rows], the segments of these.
  segment_ids: int32 [batch, capacity]; -1 where there is no token yet.
  length: int32 scalar, tokens so far, the padding of shorter rows included.
  """

  k: jax.Array
  v: jax.Array
  raw: dict[str, jax.Array]
  recent: jax.Array
  segment_ids: jax.Array
  length: jax.Array

  def begin(self, segment_ids: jax.Array) -> "Cache":
    """For the layers: knows the segments [batch, n] of the n tokens that are to come."""
    segment_ids = dispatch.place(segment_ids, TOKENS)
    ids = jax.lax.dynamic_update_slice(self.segment_ids, segment_ids, (jnp.zeros((), jnp.int32), self.length))
    return dataclasses.replace(self, segment_ids=ids)

  def end(self, segment_ids: jax.Array) -> "Cache":
    """After the layers: has these tokens."""
    (_, rows), (_, n) = self.recent.shape, segment_ids.shape
    recent = jnp.concatenate([self.recent, dispatch.place(segment_ids, TOKENS)], axis=1)[:, n : n + rows]
    recent = dispatch.place(recent, TOKENS)  # of one row, jax 0.12 forgets where a slice stands
    return dataclasses.replace(self, recent=recent, length=self.length + n)


def empty_cache(mix: Callable | None, layers, batch, capacity, heads, kv_heads, head_dim, dtype) -> Cache:
  """A cache without tokens; the look-back of `mix` (its `looks_back`) decides what raw rows it has."""
  looks_back = {} if mix is None else mix.looks_back
  rows = max(looks_back.values(), default=0)
  spec = P(None, *HEADS)

  def zeros(length, n):
    shape = (layers, batch, length, n, head_dim)
    return jnp.zeros(shape, dtype, out_sharding=spec if dispatch.on_mesh() else None)

  ids = lambda n: dispatch.place(jnp.full((batch, n), -1, jnp.int32), TOKENS)
  return Cache(
    k=zeros(capacity, kv_heads),
    v=zeros(capacity, kv_heads),
    raw={name: zeros(rows, heads if name == "q" else kv_heads) for name in looks_back},
    recent=ids(rows),
    segment_ids=ids(capacity),
    length=jnp.zeros((), jnp.int32),
  )


class Attention(nnx.Module):
  """Causal self-attention inside each document; heads grouped by the key-value head they share.

  The projections of q, k and v are one matrix [width, kv_heads, group + 2, head_dim]:
  the `group` queries of a key-value head, then its key, then its value, so that
  cutting kv_heads along the mesh axis `model` keeps every group whole.

  `mix` is the seam for papers that change keys, values or queries: a function
  (a module) of (q, k, v, segment_ids) applied to the raw projections, before
  normalisation and rotation. Its row t may depend on rows up to t; to be decoded step
  by step it says how far back it looks, `looks_back = {"k": 1, "v": 1}` in rows.
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
    rope_grid: int = 0,  # the side of a square of image tokens, see rope.grid_angles; 0: a text
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
    self.rope_base, self.rope_scaling, self.rope_grid = rope_base, rope_scaling, rope_grid
    self.group, self.implementation, self.policy = group, implementation, policy

  def __call__(self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """x [batch, length, width]; segment_ids, positions int32 [batch, length] -> [batch, length, width]."""
    q, k, v = self._project(x)
    if self.mix is not None:
      q, k, v = self.mix(q, k, v, segment_ids)
    q, k = self._rotate(q, k, positions)
    return self._join(attention(q, k, v, segment_ids=segment_ids, implementation=self.implementation))

  def weights(self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """What a call attends to, float32 [batch, heads, length, length]: dense, for looking at."""
    q, k, v = self._project(x)
    if self.mix is not None:
      q, k, v = self.mix(q, k, v, segment_ids)
    q, k = self._rotate(q, k, positions)
    return attention_weights(q, k, segment_ids=segment_ids)

  def extend(
    self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array, cache: Cache, layer: int | jax.Array, fresh: bool
  ) -> tuple[jax.Array, Cache]:
    """As a call, for tokens that follow those in `cache`, whose `layer` gets their rows.

    Between the cache's `begin` and `end`. `fresh` says that these tokens are the first, so
    that the kernels for whole rows can be used.
    """
    q, k, v = self._project(x)
    raw = cache.raw
    if self.mix is not None:
      before = cache.recent.shape[1]
      now = {"q": q, "k": k, "v": v}
      rows = {name: jnp.concatenate([_past(raw, name, z, layer, before), z], axis=1) for name, z in now.items()}
      ids = jnp.concatenate([cache.recent, dispatch.place(segment_ids, TOKENS)], axis=1)
      q, k, v = (z[:, before:] for z in self.mix(*rows.values(), ids))
      # The raw rows: what is mixed next must not have been mixed already.
      raw = {name: _put(raw[name], rows[name][:, rows[name].shape[1] - before :], layer) for name in raw}
    q, k = self._rotate(q, k, positions)
    cache = dataclasses.replace(
      cache, k=_put(cache.k, k, layer, cache.length), v=_put(cache.v, v, layer, cache.length), raw=raw
    )
    if fresh:
      y = attention(q, k, v, segment_ids=segment_ids, implementation=self.implementation)
    else:
      y = cached_attention(
        q,
        jax.lax.dynamic_index_in_dim(cache.k, layer, keepdims=False),
        jax.lax.dynamic_index_in_dim(cache.v, layer, keepdims=False),
        segment_ids=segment_ids,
        cached_segment_ids=cache.segment_ids,
        start=cache.length,
      )
    return self._join(y), cache

  def _project(self, x):
    batch, length, _ = x.shape
    y = jnp.einsum("btd,dkgh->btkgh", x, self.policy.weight(self.qkv[...]))
    # split, not indexing: its transpose is one concatenation instead of padded sums
    q, k, v = jnp.split(y, [self.group, self.group + 1], axis=3)
    # of one row, a reshape forgets where it stands
    return tuple(dispatch.place(z.reshape(batch, length, -1, z.shape[-1]), HEADS) for z in (q, k, v))

  def _rotate(self, q, k, positions):
    if self.q_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    if self.rope_grid:
      cos, sin = rope.grid_angles(positions, q.shape[-1], self.rope_base, self.rope_grid)
    else:
      cos, sin = rope.angles(positions, q.shape[-1], self.rope_base, self.rope_scaling)
    return rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)

  def _join(self, y):
    batch, length, heads, head_dim = y.shape
    y = y.reshape(batch, length, heads // self.group, self.group, head_dim)
    return jnp.einsum("btkgh,kghd->btd", y, self.policy.weight(self.out[...]), out_sharding=HIDDEN)


def _past(raw: dict[str, jax.Array], name: str, like: jax.Array, layer, rows: int) -> jax.Array:
  """The last raw rows of a layer; zeros where the mix does not look back at them."""
  if name in raw:
    return jax.lax.dynamic_index_in_dim(raw[name], layer, keepdims=False)
  shape = (like.shape[0], rows, *like.shape[2:])
  return jnp.zeros(shape, like.dtype, out_sharding=HEADS if dispatch.on_mesh() else None)


def _put(stacked: jax.Array, rows: jax.Array, layer, start=0) -> jax.Array:
  """`rows` written into layer `layer` of [layers, batch, capacity, ...], from row `start` on."""
  rows = dispatch.place(rows.astype(stacked.dtype), HEADS)[None]
  zero = jnp.zeros((), jnp.int32)
  return jax.lax.dynamic_update_slice(stacked, rows, (layer, zero, start, zero, zero))
