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
  chunk, columns, warps, stages = _blocks(d_a, d_c, a.dtype)
  padded, width = length + -length % chunk, d_a + -d_a % _rows(d_a)
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
    compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
    interpret=interpret,
    name=name,
  )
  return call(a, b, c, jnp.log(decay), runs, state)


def _kernel(
  a_ref, b_ref, c_ref, rate_ref, runs_ref, state_ref, out_ref, final_ref, *, chunk, length, d_a, d_c, reverse
):
  """One head's columns of c, from chunk to chunk. Beyond length, d_a and d_c nothing is read or written."""
  (width, columns), rows = state_ref.shape, _rows(d_a)
  at = jnp.arange(chunk, dtype=jnp.int32)
  pieces = [pl.ds(first, rows) for first in range(0, width, rows)]
  in_a = [first + jnp.arange(rows) < d_a for first in range(0, width, rows)]
  in_c = (pl.program_id(0) * columns + jnp.arange(columns) < d_c)[None, :]
  rate = rate_ref[0]
  # masked before the exponential, so that no exponent is positive
  power = lambda n, where: jnp.exp(jnp.where(where, rate * n.astype(jnp.float32), -jnp.inf))
  distance = at[None, :] - at[:, None] if reverse else at[:, None] - at[None, :]
  within = power(distance, distance >= 0)
  chunks = pl.cdiv(length, chunk)

  def step(i, states):
    start = (chunks - 1 - i if reverse else i) * chunk
    tokens = pl.ds(start, chunk)
    count = jnp.minimum(length - start, chunk)
    real = at < count
    load = lambda ref, piece, there: triton.load(ref.at[tokens, piece], mask=real[:, None] & there, other=0)
    runs = triton.load(runs_ref.at[tokens], mask=real, other=0)
    before = runs_ref[jnp.maximum(start - 1, 0)]
    after = runs_ref[start + count - 1]
    enter = power(at + 1, runs == before)  # from the chunk's left border to each token
    leave = power(count - 1 - at, real & (runs == after))  # from each token to the right border
    meet, add = (leave, enter) if reverse else (enter, leave)
    scores, out, bs = jnp.zeros((chunk, chunk), jnp.float32), jnp.zeros((chunk, columns), jnp.float32), []
    for piece, there, state in zip(pieces, in_a, states, strict=True):
      a, b = load(a_ref, piece, there[None, :]), load(b_ref, piece, there[None, :])
      scores = _add_product(scores, a, b.T, a.dtype)
      out = _add_product(out, a, state, a.dtype)
      bs.append(b)
    c = load(c_ref, slice(None), in_c)
    scores *= jnp.where(runs[:, None] == runs[None, :], within, 0)
    out = _add_product(meet[:, None] * out, scores, c, c.dtype)
    triton.store(out_ref.at[tokens, :], out.astype(out_ref.dtype), mask=real[:, None] & in_c)
    goes_on = jnp.where(before == after, jnp.exp(rate * count.astype(jnp.float32)), 0)
    added = add[:, None] * c.astype(jnp.float32)
    return tuple(_add_product(goes_on * state, b.T, added, c.dtype) for b, state in zip(bs, states, strict=True))

  parts = [(piece, there[:, None] & in_c) for piece, there in zip(pieces, in_a, strict=True)]
  states = tuple(triton.load(state_ref.at[piece, :], mask=mask, other=0) for piece, mask in parts)
  states = jax.lax.fori_loop(0, chunks, step, states)
  for (piece, mask), state in zip(parts, states, strict=True):
    triton.store(final_ref.at[piece, :], state, mask=mask)


def _add_product(total, x, y, dtype):
  """total + x @ y in float32, to the precision that operands of `dtype` ask for."""
  xs, ys = _terms(x, dtype), _terms(y, dtype)
  most = max(len(xs), len(ys))
  products = [(i, j) for i in range(len(xs)) for j in range(len(ys)) if i + j < most]
  for i, j in sorted(products, key=sum, reverse=True):  # the smallest first
    # one after another, so that Triton adds in place
    total += jnp.dot(xs[i], ys[j], precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32)
  return total


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


def flops(kernel: str, shapes: list[tuple[int, ...]], bits: int) -> float | None:
  """What a compiled kernel computes, by its name, its operands' shapes and the bits of the first; None for others.

  The products of a chunk as they are done: with every term of `_add_product`, to whole pieces
  of the state, and the scores once for each of the programs that share the columns out.
  """
  if kernel not in ("lightning_forward", "lightning_dq", "lightning_dk", "lightning_dv"):
    return None
  (batch, length, heads, d_a), _, (*_, d_c) = shapes[:3]
  exact = bits == 32
  chunk, columns, _, _ = _blocks(d_a, d_c, jnp.float32 if exact else jnp.bfloat16)
  width, programs = d_a + -d_a % _rows(d_a), pl.cdiv(d_c, columns)
  narrow, wide = (6, 6) if exact else (1, 2)  # products of operands alone, and with a float32 factor
  scores = narrow * chunk * width
  rest = wide * (2 * width + chunk) * columns  # from the state, to it, and scores times c
  return 2.0 * batch * heads * pl.cdiv(length, chunk) * chunk * programs * (scores + rest)


def _blocks(d_a: int, d_c: int, dtype) -> tuple[int, int, int, int]:
  """Tokens in a chunk, columns of a program, its warps, and chunks in flight: what ptxas needs to spill no register."""
  # Registers a thread of (forward and dq, dk and dv) on sm_90a, ptxas 12.9, length 1000; none is spilled:
  #   d_k = d_v       64          96         128         256
  #   bfloat16    194, 184    215, 223    217, 208    252, 255
  #   float32     173, 172    255, 252    255, 255    255, 255
  # Of 128 x 128 in bfloat16, 64 columns spill 424 bytes with 4 warps and 128 with 8; in float32, 32 tokens spill 424.
  if dtype == jnp.float32:
    return 16, min(32, _power_of_two(d_c)), 4 if d_a <= 128 else 8, 1
  if d_a > 128:
    return 32, min(64, _power_of_two(d_c)), 8, 2
  return 64, min(32, _power_of_two(d_c)), 4, 2


def _rows(d_a: int) -> int:
  """Of a piece of the state: a whole one has to be a power of two, and makes more registers live at once."""
  return min(64, _power_of_two(d_a))


def _power_of_two(d: int) -> int:
  """At least 16, as products have to be."""
  return max(16, 2 ** math.ceil(math.log2(d)))
