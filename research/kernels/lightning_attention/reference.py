"""Linear attention with exponential decay written down densely, and as a recurrence: the truth for the others."""

import jax
import jax.numpy as jnp


def attention(q_bthk, k_bthk, v_bthv, decay_h, segment_ids=None, state_bhkv=None):
  """As `api.lightning_attention`; float64 operands are computed in float64, all others in float32. Quadratic."""
  dtype = jnp.promote_types(q_bthk.dtype, jnp.float32)
  q, k, v, state = (None if x is None else x.astype(dtype) for x in (q_bthk, k_bthk, v_bthv, state_bhkv))
  length = q.shape[1]
  rate = jnp.log(decay_h.astype(dtype))
  runs = run_numbers(segment_ids, q.shape[:2])
  at = jnp.arange(length)
  distance = at[:, None] - at[None, :]
  # masked before the exponential: above the diagonal it would overflow
  weights = jnp.where(distance >= 0, jnp.exp(rate[:, None, None] * jnp.maximum(distance, 0)), 0)
  same = runs[:, :, None] == runs[:, None, :]
  weights = jnp.where(same[:, None], weights[None], 0)
  scores = jnp.einsum("bthk,bshk->bhts", q, k, precision="highest") * weights
  out = jnp.einsum("bhts,bshv->bthv", scores, v, precision="highest")
  last = (runs == runs[:, -1:])[:, None] * jnp.exp(rate[:, None] * (length - 1 - at))  # [batch, heads, length]
  final = jnp.einsum("bhs,bshk,bshv->bhkv", last, k, v, precision="highest")
  if state is not None:
    first = (runs == 0)[:, None] * jnp.exp(rate[:, None] * (at + 1))
    out += jnp.einsum("bht,bthk,bhkv->bthv", first, q, state, precision="highest")
    final += (runs[:, -1] == 0)[:, None, None, None] * jnp.exp(rate * length)[:, None, None] * state
  return out.astype(q_bthk.dtype), final


def recurrent(q_bthk, k_bthk, v_bthv, decay_h, segment_ids=None, state_bhkv=None):
  """As `attention`, a token at a time: S_t = decay S_{t-1} + k_t v_t^T, o_t = q_t S_t. Nothing in it can overflow."""
  dtype = jnp.promote_types(q_bthk.dtype, jnp.float32)
  decay = decay_h.astype(dtype)[:, None, None]
  runs = run_numbers(segment_ids, q_bthk.shape[:2])
  goes_on = jnp.concatenate([runs[:, :1] == 0, runs[:, 1:] == runs[:, :-1]], axis=1)
  if state_bhkv is None:
    (batch, _, heads, d_k), d_v = q_bthk.shape, v_bthv.shape[-1]
    state_bhkv = jnp.zeros((batch, heads, d_k, d_v), dtype)

  def step(state, token):
    q, k, v, goes_on = token
    state = jnp.where(goes_on[:, None, None, None], decay * state, 0) + k[..., :, None] * v[..., None, :]
    return state, jnp.einsum("bhk,bhkv->bhv", q, state, precision="highest")

  tokens = (q_bthk.astype(dtype), k_bthk.astype(dtype), v_bthv.astype(dtype), goes_on)
  final, out = jax.lax.scan(step, state_bhkv.astype(dtype), jax.tree.map(lambda x: x.swapaxes(0, 1), tokens))
  return out.swapaxes(0, 1).astype(q_bthk.dtype), final


def run_numbers(segment_ids, shape):
  """int32 [batch, length]: 0 from the first token on, one more wherever the segment id changes."""
  if segment_ids is None:
    return jnp.zeros(shape, jnp.int32)
  changes = segment_ids[:, 1:] != segment_ids[:, :-1]
  return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
