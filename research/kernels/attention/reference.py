"""Causal attention written down densely: the truth the others are tested against."""

import jax
import jax.numpy as jnp


def attention(q_bthd, k_bskd, v_bskd, segment_ids=None, *, scale):
  """As `api.attention`; float64 operands are computed in float64, all others in float32."""
  dtype = jnp.promote_types(q_bthd.dtype, jnp.float32)
  length, heads, kv_heads = q_bthd.shape[1], q_bthd.shape[2], k_bskd.shape[2]
  q = q_bthd.astype(dtype)
  k, v = (jnp.repeat(x.astype(dtype), heads // kv_heads, axis=2) for x in (k_bskd, v_bskd))
  scores = scale * jnp.einsum("bthd,bshd->bhts", q, k, precision="highest")
  visible = jnp.tril(jnp.ones((length, length), bool))
  if segment_ids is not None:
    visible = visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
  probs = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
  return jnp.einsum("bhts,bshd->bthd", probs, v, precision="highest").astype(q_bthd.dtype)
