"""Causal attention written down densely: the truth the others are tested against."""

import jax
import jax.numpy as jnp


def attention(q_bthd, k_bskd, v_bskd, segment_ids=None, *, scale):
  """As `api.attention`; float64 operands are computed in float64, all others in float32."""
  probs = weights(q_bthd, k_bskd, segment_ids, scale=scale)
  v = jnp.repeat(v_bskd.astype(probs.dtype), q_bthd.shape[2] // v_bskd.shape[2], axis=2)
  return jnp.einsum("bhts,bshd->bthd", probs, v, precision="highest").astype(q_bthd.dtype)


def weights(q_bthd, k_bskd, segment_ids=None, *, scale):
  """The attention weights [batch, heads, length, length], float32 or, of float64 operands, float64."""
  dtype = jnp.promote_types(q_bthd.dtype, jnp.float32)
  length, heads, kv_heads = q_bthd.shape[1], q_bthd.shape[2], k_bskd.shape[2]
  k = jnp.repeat(k_bskd.astype(dtype), heads // kv_heads, axis=2)
  scores = scale * jnp.einsum("bthd,bshd->bhts", q_bthd.astype(dtype), k, precision="highest")
  visible = jnp.tril(jnp.ones((length, length), bool))
  if segment_ids is not None:
    visible = visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
  return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
