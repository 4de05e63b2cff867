"""Linear attention with decay on NVIDIA GPUs: one fused Triton kernel, forward and for every gradient.

Lightning Attention-2 (Qin et al., 2024, arXiv 2401.04658): quadratic inside a chunk, a
state of d_k x d_v between chunks. A program walks one head of one row from chunk to
chunk with its columns of the state in registers, so nothing between the inputs and the
results is ever in memory. With

  f(a, b, c)_r = sum over s <= r of decay^(r-s) (a_r . b_s) c_s

out is f(q, k, v) and dq is f(dout, v, k); with s >= r, decay^(s-r) and the chunks taken
from the last to the first, dk is f(v, dout, q) and dv is f(k, q, dout). The columns of c, of
the state and of the result belong together and to no others: programs share them out.

Precision: tensor cores multiply bfloat16 exactly and add in float32. A float32 factor is
taken as a sum of bfloat16 numbers: of two (16 bits) beside bfloat16 operands, whose result
is rounded to 8 bits, of three (24 bits) beside float32 ones.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp

from research.kernels import dispatch
from research.kernels.lightning_attention.reference import run_numbers

LARGEST = 256  # head dim


def obstacle(q, v) -> str | None:
  """Why this cannot run the call; None if it can."""
  if dispatch.platform() != "gpu":
    return f"the Triton kernel needs a GPU, and this runs on {dispatch.platform()}"
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    return f"the Triton kernel takes bfloat16 or float32, not {q.dtype}"
  if max(q.shape[3], v.shape[3]) > LARGEST:
    return f"the Triton kernel takes d_k and d_v up to {LARGEST}, not {q.shape[3]} and {v.shape[3]}"
  return None


def attention(q_bthk, k_bthk, v_bthv, decay_h, segment_ids=None, state_bhkv=None, *, interpret: bool = False):
  """As `api.lightning_attention`, for bfloat16 and float32. Inside a shard_map when there is a mesh."""
  (batch, length, heads, d_k), d_v = q_bthk.shape, v_bthv.shape[-1]
  if state_bhkv is None:
    state_bhkv = jnp.zeros((batch, heads, d_k, d_v), jnp.float32)
  runs = run_numbers(segment_ids, (batch, length))
  return _attention(q_bthk, k_bthk, v_bthv, decay_h.astype(jnp.float32), runs, state_bhkv, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, decay, runs, state, interpret):
  return _sweep("lightning_forward", q, k, v, decay, runs, state, interpret)


def _forward(q, k, v, decay, runs, state, interpret):
  return _attention(q, k, v, decay, runs, state, interpret), (q, k, v, decay, runs, state)


def _backward(interpret, residuals, cotangents):
  q, k, v, decay, runs, state = residuals
  dout, dfinal = cotangents
  turned = lambda x: x.swapaxes(2, 3)
  dq, _ = _sweep("lightning_dq", dout, v, k, decay, runs, turned(state), interpret)
  dk, _ = _sweep("lightning_dk", v, dout, q, decay, runs, turned(dfinal), interpret, reverse=True)
  dv, dstate = _sweep("lightning_dv", k, q, dout, decay, runs, dfinal, interpret, reverse=True)
  return dq, dk, dv, jnp.zeros_like(decay), None, dstate  # the decay is a constant of the model


_attention.defvjp(_forward, _backward)


def _sweep(name, a, b, c, decay, runs, state, interpret, reverse=False):
  """(f(a, b, c) in c's dtype, the state [batch, heads, d_a, d_c] after the last chunk taken) from `state` before it."""
  (batch, length, heads, d_a), d_c = a.shape, c.shape[-1]
  chunk, columns, warps = _blocks(d_a, d_c, a.dtype)
  width = _power_of_two(d_a)
  padded = length + -length % chunk
  # blocks reach beyond the arrays; the kernel masks what it loads and stores there
  whole = pl.BlockSpec((None, padded, None, width), lambda j, h, b: (b, 0, h, 0))
  part = pl.BlockSpec((None, padded, None, columns), lambda j, h, b: (b, 0, h, j))
  states = pl.BlockSpec((None, None, width, columns), lambda j, h, b: (b, h, 0, j))
  call = pl.pallas_call(
    functools.partial(_kernel, chunk=chunk, length=length, d_a=d_a, d_c=d_c, reverse=reverse),
    out_shape=(jax.ShapeDtypeStruct(c.shape, c.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)),
    # programs that differ in their columns alone run side by side: they read a and b from L2
    grid=(pl.cdiv(d_c, columns), heads, batch),
    in_specs=[
      whole,
      whole,
      part,
      pl.BlockSpec((1,), lambda j, h, b: (h,)),
      pl.BlockSpec((None, padded), lambda j, h, b: (b, 0)),
      states,
    ],
    out_specs=(part, states),
    compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
    interpret=interpret,
    name=name,
  )
  return call(a, b, c, jnp.log(decay), runs, state)


def _kernel(
  a_ref, b_ref, c_ref, rate_ref, runs_ref, state_ref, out_ref, final_ref, *, chunk, length, d_a, d_c, reverse
):
  """One head's columns of c, from chunk to chunk. Beyond length, d_a and d_c nothing is read or written."""
  width, columns = state_ref.shape
  at = jnp.arange(chunk)
  in_a = (jnp.arange(width) < d_a)[None, :]
  in_c = (pl.program_id(0) * columns + jnp.arange(columns) < d_c)[None, :]
  in_state = in_a.T & in_c
  rate = rate_ref[0]
  # masked before the exponential, so that no exponent is positive
  power = lambda n, where: jnp.exp(jnp.where(where, rate * n.astype(jnp.float32), -jnp.inf))
  distance = at[None, :] - at[:, None] if reverse else at[:, None] - at[None, :]
  within = power(distance, distance >= 0)
  chunks = pl.cdiv(length, chunk)

  def step(i, state):
    start = (chunks - 1 - i if reverse else i) * chunk
    rows = pl.ds(start, chunk)
    count = jnp.minimum(length - start, chunk)
    real = at < count
    load = lambda ref, where: triton.load(ref.at[rows, :], mask=real[:, None] & where, other=0)
    a, b, c = load(a_ref, in_a), load(b_ref, in_a), load(c_ref, in_c)
    runs = triton.load(runs_ref.at[rows], mask=real, other=0)
    before = runs_ref[jnp.maximum(start - 1, 0)]
    after = runs_ref[start + count - 1]
    enter = power(at + 1, runs == before)  # from the chunk's left border to each token
    leave = power(count - 1 - at, real & (runs == after))  # from each token to the right border
    meet, add = (leave, enter) if reverse else (enter, leave)
    scores = _dot(a, b.T, a.dtype) * jnp.where(runs[:, None] == runs[None, :], within, 0)
    out = meet[:, None] * _dot(a, state, a.dtype) + _dot(scores, c, a.dtype)
    triton.store(out_ref.at[rows, :], out.astype(out_ref.dtype), mask=real[:, None] & in_c)
    goes_on = jnp.where(before == after, jnp.exp(rate * count.astype(jnp.float32)), 0)
    return goes_on * state + _dot(b.T, add[:, None] * c.astype(jnp.float32), a.dtype)

  state = triton.load(state_ref.at[:, :], mask=in_state, other=0)
  triton.store(final_ref.at[:, :], jax.lax.fori_loop(0, chunks, step, state), mask=in_state)


def _dot(x, y, dtype):
  """x @ y in float32 to the precision that operands of `dtype` ask for."""
  xs, ys = _terms(x, dtype), _terms(y, dtype)
  most = max(len(xs), len(ys))
  products = [(i, j) for i in range(len(xs)) for j in range(len(ys)) if i + j < most]
  # the smallest first
  products.sort(key=sum, reverse=True)
  return functools.reduce(jnp.add, (jnp.dot(xs[i], ys[j], preferred_element_type=jnp.float32) for i, j in products))


def _terms(x, dtype) -> list[jax.Array]:
  """bfloat16 arrays, the largest first, whose sum is x: to 16 bits beside operands of bfloat16, else to all 24."""
  if x.dtype == jnp.bfloat16:
    return [x]
  terms = []
  for _ in range(1 if dtype == jnp.bfloat16 else 2):
    # cut by bits: XLA, which runs this on a CPU, may take a conversion there and back for nothing
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
    top = jax.lax.bitcast_convert_type(bits, jnp.float32)
    terms.append(top.astype(jnp.bfloat16))
    x = x - top
  return [*terms, x.astype(jnp.bfloat16)]


def _blocks(d_a: int, d_c: int, dtype) -> tuple[int, int, int]:
  """Tokens in a chunk, columns of a program and its warps: registers without spills, see the table in the tests."""
  columns = min(64, _power_of_two(d_c))
  return 64, columns, 4


def _power_of_two(d: int) -> int:
  """As Triton wants its blocks, and at least 16, as its products do."""
  return max(16, 2 ** math.ceil(math.log2(d)))
