"""One token more of linear attention with decay, whose rounding does not add up over long texts."""

import jax
from jax import P
from jax import numpy as jnp

from research.kernels import dispatch
from research.mesh import BATCH


def step(
  q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array, state: jax.Array, residue: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """S_t = decay S_{t-1} + k_t v_t^T, out_t = q_t S_t, for one token; S is `state` + `residue`.

  In float32 alone, a decay next to 1 rounds away: a state that should lose less than half of
  its last digit a token loses nothing, for ever. So the change is computed by itself, and what
  the sum rounds off is kept for the next token (Knuth's two-sum).

  Args:
    q, k: [batch, 1, heads, d_k]; v: [batch, 1, heads, d_v].
    decay: float32 [heads].
    state, residue: float32 [batch, heads, d_k, d_v].

  Returns:
    (out [batch, 1, heads, d_v] in q's dtype, the new state, its residue).
  """
  token = P(BATCH, "model", None)
  q_, k_, v_ = (dispatch.place(jnp.squeeze(x, 1).astype(state.dtype), token) for x in (q, k, v))
  decay = dispatch.place(jnp.asarray(decay), P("model"))[:, None, None]
  change = k_[..., :, None] * v_[..., None, :] - (1 - decay) * state + decay * residue
  new = state + change
  added = new - state
  residue = (state - (new - added)) + (change - added)
  out = jnp.einsum("bhk,bhkv->bhv", q_, new, precision="highest")
  return out[:, None].astype(q.dtype), new, residue
