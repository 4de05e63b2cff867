"""Linear attention with decay for any platform, in plain XLA: chunks of quadratic attention, and a state between them.

Lightning Attention-2 (Qin et al., 2024, arXiv 2401.04658, algorithms 1 and 2), with the
factors that its equations 9 to 19 misprint re-derived: inside a chunk token r of C meets the
state before the chunk with decay^(r+1), and adds to the state after it with decay^(C-1-r).
No power of the decay is ever inverted, so nothing overflows. The backward pass keeps no
states: it goes forward once more for dq and then back for dk and dv.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.kernels import dispatch
from research.kernels.lightning_attention.reference import run_numbers

CHUNK = 128
CHUNK_CPU = 64  # scores of 128 x 128 fall out of a core's cache


def attention(q_bthk, k_bthk, v_bthv, decay_h, segment_ids=None, state_bhkv=None, *, chunk: int | None = None):
  """As `api.lightning_attention`."""
  chunk = chunk or (CHUNK_CPU if dispatch.platform() == "cpu" else CHUNK)
  (batch, length, heads, d_k), d_v = q_bthk.shape, v_bthv.shape[-1]
  dtype = jnp.promote_types(q_bthk.dtype, jnp.float32)
  if state_bhkv is None:
    state_bhkv = jnp.zeros((batch, heads, d_k, d_v), dtype)
  chunk = min(chunk, length)
  pad = -length % chunk
  runs = run_numbers(segment_ids, (batch, length))
  q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q_bthk, k_bthk, v_bthv))
  runs = jnp.pad(runs, ((0, 0), (0, pad)), mode="edge")
  out, final = _attention(q, k, v, decay_h.astype(dtype), runs, state_bhkv.astype(dtype), chunk, length)
  return out[:, :length], final


class _Factors(NamedTuple):
  """What multiplies the parts of one chunk; r and s count its tokens from 0."""

  within: jax.Array  # [batch, heads, r, s]: decay^(r-s) where s <= r and both are of one run
  enter: jax.Array  # [batch, heads, r]: decay^(r+1) where the run is the state's
  leave: jax.Array  # [batch, heads, s]: decay^(end-1-s) where the run is the one that goes on
  whole: jax.Array  # [batch, heads]: decay^end where the state's run goes on through the chunk


def _factors(rate, runs, before, count):
  """rate: log decay [heads]; runs [batch, chunk]; before: the state's run [batch]; count: real tokens in the chunk."""
  at = jnp.arange(runs.shape[1])
  same = lambda a, b: (a == b)[:, None].astype(rate.dtype)
  power = lambda n: jnp.exp(rate.reshape(-1, *[1] * n.ndim) * jnp.maximum(n, 0).astype(rate.dtype)) * (n >= 0)
  after = runs[:, -1]  # padding is of the last token's run
  return _Factors(
    within=power(at[:, None] - at) * same(runs[:, :, None], runs[:, None, :]),
    enter=power(at + 1) * same(runs, before[:, None]),
    leave=power(count - 1 - at) * same(runs, after[:, None]),
    whole=power(jnp.asarray(count)) * same(before, after),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(q, k, v, decay, runs, state, chunk, length):
  return _forward(q, k, v, decay, runs, state, chunk, length)


def _forward(q, k, v, decay, runs, state, chunk, length):
  rate = jnp.log(decay)

  def step(carry, xs):
    state, before = carry
    q, k, v, runs, count = xs
    f = _factors(rate, runs, before, count)
    scores = _dot("brhk,bshk->bhrs", q, k) * f.within
    out = _dot("bhrs,bshv->brhv", scores, v) + _dot("bhr,brhk,bhkv->brhv", f.enter, q, state)
    state = f.whole[..., None, None] * state + _dot("bhs,bshk,bshv->bhkv", f.leave, k, v)
    return (state, runs[:, -1]), out.astype(xs[0].dtype)

  (final, _), out = jax.lax.scan(step, (state, runs[:, 0]), _chunks(chunk, length, q, k, v, runs))
  return _join(out), final


def _forward_fwd(q, k, v, decay, runs, state, chunk, length):
  return _forward(q, k, v, decay, runs, state, chunk, length), (q, k, v, decay, runs, state)


def _backward(chunk, length, residuals, cotangents):
  q, k, v, decay, runs, state = residuals
  dout, dfinal = cotangents
  rate = jnp.log(decay)
  xs = _chunks(chunk, length, q, k, v, runs)
  (douts,) = _cut(chunk, dout)

  def forward(carry, xs):
    state, before = carry
    (_, k, v, runs, count), dout = xs
    f = _factors(rate, runs, before, count)
    dscores = _dot("brhv,bshv->bhrs", dout, v) * f.within
    dq = _dot("bhrs,bshk->brhk", dscores, k) + _dot("bhr,brhv,bhkv->brhk", f.enter, dout, state)
    state = f.whole[..., None, None] * state + _dot("bhs,bshk,bshv->bhkv", f.leave, k, v)
    return (state, runs[:, -1]), (dq.astype(k.dtype), before)

  _, (dq, befores) = jax.lax.scan(forward, (state, runs[:, 0]), (xs, douts))

  def back(dstate, xs):
    (q, k, v, runs, count), dout, before = xs
    f = _factors(rate, runs, before, count)
    scores = _dot("brhk,bshk->bhrs", q, k) * f.within
    dscores = _dot("brhv,bshv->bhrs", dout, v) * f.within
    dk = _dot("bhrs,brhk->bshk", dscores, q) + _dot("bhs,bshv,bhkv->bshk", f.leave, v, dstate)
    dv = _dot("bhrs,brhv->bshv", scores, dout) + _dot("bhs,bshk,bhkv->bshv", f.leave, k, dstate)
    dstate = f.whole[..., None, None] * dstate + _dot("bhr,brhk,brhv->bhkv", f.enter, q, dout)
    return dstate, (dk.astype(k.dtype), dv.astype(v.dtype))

  dstate, (dk, dv) = jax.lax.scan(back, dfinal, (xs, douts, befores), reverse=True)
  # the decay is a constant of the model
  return _join(dq), _join(dk), _join(dv), jnp.zeros_like(decay), None, dstate


_attention.defvjp(_forward_fwd, _backward)


def _dot(spec, *operands):
  """einsum in float32 (float64 of float64). Of three operands the first multiplies the second, number by number."""
  operands = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in operands]
  if len(operands) == 3:
    *names, out = spec.replace("->", ",").split(",")
    operands = [jnp.einsum(f"{names[0]},{names[1]}->{names[1]}", *operands[:2]), operands[2]]
    spec = f"{names[1]},{names[2]}->{out}"
  return jnp.einsum(spec, *operands, precision="highest")


def _cut(chunk, *xs):
  """[batch, length, ...] -> [length / chunk, batch, chunk, ...]."""
  return tuple(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1) for x in xs)


def _chunks(chunk, length, q, k, v, runs):
  n = q.shape[1] // chunk
  counts = jnp.minimum(length - chunk * jnp.arange(n), chunk)
  return *_cut(chunk, q, k, v, runs), counts


def _join(x):
  """The inverse of `_cut`."""
  x = x.swapaxes(0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])
