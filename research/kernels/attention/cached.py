"""Attention of a few new tokens to a cache of keys and values."""

import jax
import jax.numpy as jnp


def attention(q_bthd, k_bskd, v_bskd, segment_ids, cached_segment_ids, start, *, scale):
  """As `api.cached_attention`. Key-value heads are not repeated: at length 1 reading them is all the cost."""
  dtype = jnp.promote_types(q_bthd.dtype, jnp.float32)
  batch, length, heads, head_dim = q_bthd.shape
  capacity, kv_heads = k_bskd.shape[1:3]
  q = q_bthd.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
  scores = scale * jnp.einsum("btkgd,bskd->bkgts", q, k_bskd, preferred_element_type=dtype)
  visible = jnp.arange(capacity) <= start + jnp.arange(length)[:, None]
  visible = visible & (segment_ids[:, :, None] == cached_segment_ids[:, None, :])
  probs = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1).astype(v_bskd.dtype)
  y = jnp.einsum("bkgts,bskd->btkgd", probs, v_bskd, preferred_element_type=dtype)
  return y.reshape(q_bthd.shape).astype(q_bthd.dtype)
