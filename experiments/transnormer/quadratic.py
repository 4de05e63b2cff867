"""Lightning Attention-1: tiles of the dense form, as FlashAttention has them, without a softmax. Quadratic time.

Qin et al., 2023 (arXiv 2307.14995): the attention of TransNormerLLM before Lightning
Attention-2 put a state between the chunks. Keeps nothing of the size of length^2.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from research.kernels.lightning_attention import xla
from research.kernels.lightning_attention.reference import run_numbers

TILE = 128


def attention(q_bthk, k_bthk, v_bthv, decay_h, segment_ids=None, state_bhkv=None, *, tile: int = TILE):
  """As `research.kernels.lightning_attention.api.lightning_attention`. What comes after a state is chunked.

  So is the state after the last token, which costs nothing where nobody asks for it, as in training.
  """
  out, final = xla.attention(q_bthk, k_bthk, v_bthv, decay_h, segment_ids, state_bhkv)
  if state_bhkv is not None:
    return out, final
  length, dtype = q_bthk.shape[1], jnp.promote_types(q_bthk.dtype, jnp.float32)
  tile = min(tile, length)
  runs = run_numbers(segment_ids, q_bthk.shape[:2])
  # what is added at the end of a row stands after every real token
  pad = lambda x: jnp.pad(x, ((0, 0), (0, -length % tile), *[(0, 0)] * (x.ndim - 2)))
  q, k, v = (pad(x.astype(dtype)) for x in (q_bthk, k_bthk, v_bthv))
  tiled = _attention(q, k, v, jnp.log(decay_h.astype(dtype)), pad(runs), tile)
  return tiled[:, :length].astype(q_bthk.dtype), final


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, rate, runs, tile):
  return _forward(q, k, v, rate, runs, tile)[0]


def _forward(q, k, v, rate, runs, tile):
  def row(i):
    q_i = _tile(q, i, tile)

    def add(j, out):
      scores = jnp.einsum("brhk,bshk->bhrs", q_i, _tile(k, j, tile)) * _weights(rate, runs, i, j, tile)
      return out + jnp.einsum("bhrs,bshv->brhv", scores, _tile(v, j, tile))

    return lax.fori_loop(0, i + 1, add, jnp.zeros_like(_tile(v, i, tile)))

  out = lax.map(row, jnp.arange(q.shape[1] // tile))
  return _join(out), (q, k, v, rate, runs)


def _backward(tile, residuals, dout):
  q, k, v, rate, runs = residuals
  tiles = q.shape[1] // tile

  def column(dq, j):
    k_j, v_j = _tile(k, j, tile), _tile(v, j, tile)

    def add(i, sums):
      dq, dk, dv = sums
      q_i, dout_i, weights = _tile(q, i, tile), _tile(dout, i, tile), _weights(rate, runs, i, j, tile)
      scores = jnp.einsum("brhk,bshk->bhrs", q_i, k_j) * weights
      dscores = jnp.einsum("brhv,bshv->bhrs", dout_i, v_j) * weights
      more = _tile(dq, i, tile) + jnp.einsum("bhrs,bshk->brhk", dscores, k_j)
      dq = lax.dynamic_update_slice_in_dim(dq, more, i * tile, axis=1)
      dk = dk + jnp.einsum("bhrs,brhk->bshk", dscores, q_i)
      return dq, dk, dv + jnp.einsum("bhrs,brhv->bshv", scores, dout_i)

    dq, *dkv = lax.fori_loop(j, tiles, add, (dq, jnp.zeros_like(k_j), jnp.zeros_like(v_j)))
    return dq, tuple(dkv)

  dq, (dk, dv) = lax.scan(column, jnp.zeros_like(q), jnp.arange(tiles))
  return dq, _join(dk), _join(dv), jnp.zeros_like(rate), None


_attention.defvjp(_forward, _backward)


def _tile(x, i, tile):
  return lax.dynamic_slice_in_dim(x, i * tile, tile, axis=1)


def _join(x):
  """[tiles, batch, tile, ...] -> [batch, length, ...]."""
  x = x.swapaxes(0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _weights(rate, runs, i, j, tile):
  """[batch, heads, r, s]: decay^distance between tiles i of queries and j of keys; 0 for later keys and other runs."""
  at = jnp.arange(tile)
  distance = (i - j) * tile + at[:, None] - at
  same = _tile(runs, i, tile)[:, :, None] == _tile(runs, j, tile)[:, None, :]
  # masked before the exponential: above the diagonal it would overflow
  power = jnp.exp(rate[:, None, None] * jnp.maximum(distance, 0).astype(rate.dtype))
  return jnp.where(same[:, None] & (distance >= 0), power, 0)
