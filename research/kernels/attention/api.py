"""Causal self-attention over packed sequences."""

import functools
import math

import jax
from jax import P

from research.errors import check
from research.kernels import dispatch
from research.kernels.attention import cached, cudnn, reference, splash, xla
from research.mesh import BATCH, TOKENS

HEADS = P(BATCH, None, "model", None)  # [batch, length, heads, head_dim]

IMPLEMENTATIONS = {
  "splash": splash.attention,
  "cudnn": cudnn.attention,
  "xla": xla.attention,
  "reference": reference.attention,
}


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  scale: float | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """softmax(scale * q k^T) v, where position i sees j iff j <= i and both are of one segment.

  Args:
    q: [batch, length, heads, head_dim]. Query head kv * G + g reads key-value head kv,
      with G = heads / kv_heads (GQA, https://arxiv.org/abs/2305.13245; G = heads is MQA).
    k: [batch, length, kv_heads, head_dim].
    v: [batch, length, kv_heads, head_dim].
    segment_ids: int32 [batch, length], or None for one segment a row.
    scale: a Python number; default 1 / sqrt(head_dim).
    implementation: "splash" (TPU), "cudnn" (GPU), "xla" (anywhere), "reference" (dense),
      or None for the first of these that supports the call.

  Returns:
    [batch, length, heads, head_dim] in q's dtype; the softmax is float32 inside (float64
    for float64 operands). On a mesh all four arrays are cut by batch and heads, and no
    device talks to another.

  Raises:
    UserError: shapes that do not fit together or on the mesh, an unknown implementation,
      or a named one that cannot run this call.
  """
  _check_shapes(q, k, v, segment_ids)
  chosen = dispatch.choose(
    implementation,
    {"splash": splash.obstacle(q), "cudnn": cudnn.obstacle(q, segment_ids), "xla": None, "reference": None},
  )
  scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
  local = functools.partial(IMPLEMENTATIONS[chosen], scale=scale)
  q, k, v = (dispatch.place(x, HEADS) for x in (q, k, v))
  return dispatch.per_shard(local, (HEADS, HEADS, HEADS, TOKENS), HEADS)(q, k, v, dispatch.place(segment_ids, TOKENS))


def attention_weights(q: jax.Array, k: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
  """What `attention` gives each position, [batch, heads, length, length], cut by batch and heads: dense, to look at."""
  local = functools.partial(reference.weights, scale=1 / math.sqrt(q.shape[-1]))
  q, k, segment_ids = dispatch.place(q, HEADS), dispatch.place(k, HEADS), dispatch.place(segment_ids, TOKENS)
  return dispatch.per_shard(local, (HEADS, HEADS, TOKENS), P(BATCH, "model", None, None))(q, k, segment_ids)


def cached_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  segment_ids: jax.Array,
  cached_segment_ids: jax.Array,
  start: jax.Array,
) -> jax.Array:
  """Attention of a few new tokens to themselves and all before them, whose keys and values are kept.

  Args:
    q: [batch, length, heads, head_dim] of the new tokens, number start ... start + length - 1 of their row.
    k: [batch, capacity, kv_heads, head_dim], the new tokens' keys included.
    v: [batch, capacity, kv_heads, head_dim].
    segment_ids: int32 [batch, length] of the new tokens.
    cached_segment_ids: int32 [batch, capacity]; token i sees token j <= i of its own segment.
    start: int32 scalar.

  Returns:
    [batch, length, heads, head_dim] in q's dtype; the softmax is float32 inside. On a mesh
    cut by batch and heads, as `attention`. Forward only in use; dense, so its memory grows as length x capacity.
  """
  local = functools.partial(cached.attention, scale=1 / math.sqrt(q.shape[-1]))
  q, k, v = (dispatch.place(x, HEADS) for x in (q, k, v))
  ids = (dispatch.place(x, TOKENS) for x in (segment_ids, cached_segment_ids))
  return dispatch.per_shard(local, (HEADS, HEADS, HEADS, TOKENS, TOKENS, P()), HEADS)(q, k, v, *ids, start)


def _check_shapes(q, k, v, segment_ids):
  check(k.shape == v.shape, "v", v.shape, f"k has shape {k.shape}; give k and v one shape")
  fits = q.ndim == k.ndim == 4 and (q.shape[:2], q.shape[3]) == (k.shape[:2], k.shape[3])
  check(fits, "k", k.shape, f"q has shape {q.shape}; batch, length and head_dim have to agree")
  heads, kv_heads = q.shape[2], k.shape[2]
  check(heads % kv_heads == 0, "kv_heads", kv_heads, f"use a divisor of the {heads} query heads")
  check(q.dtype == k.dtype == v.dtype, "k", k.dtype, f"q is {q.dtype}; give q, k and v one dtype")
  if segment_ids is not None:
    check(segment_ids.shape == q.shape[:2], "segment_ids", segment_ids.shape, f"use [batch, length] = {q.shape[:2]}")
  model = dispatch.axis_size("model")
  check(kv_heads % model == 0, "kv_heads", kv_heads, f"mesh.model={model} cuts them; use a multiple of it")
  shards = dispatch.batch_shards()
  check(q.shape[0] % shards == 0, "batch", q.shape[0], f"use a multiple of replica x data = {shards}")
