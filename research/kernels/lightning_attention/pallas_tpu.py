"""Linear attention with decay on TPUs: one kernel a direction, the state in VMEM from the first token to the last.

The mathematics is that of xla.py. A grid step takes a block of tokens of a few heads, straight
from [batch, length, heads * d]: no transpose is needed before or after. In it the chunks of
`CHUNK` tokens are unrolled; the decay's powers are made once a head.

What is rounded to bfloat16 for the matrix units is split in two, the nearest bfloat16 and
what that leaves: scores, scaled values and the state then carry 16 bits, and the result
is as exact as its own rounding. The halves stand side by side along the contraction, where a
chunk of 64 fills half a matrix unit only.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from research.kernels import dispatch
from research.kernels.lightning_attention.reference import run_numbers

LANES = 128
CHUNK = 64  # tokens between two states
BLOCK = 512  # tokens of a grid step


def obstacle(q, v) -> str | None:
  """Why this cannot run the call; None if it can."""
  if dispatch.platform() != "tpu":
    return f"the TPU kernel needs a TPU, and this runs on {dispatch.platform()}"
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    return f"the TPU kernel takes bfloat16 or float32, not {q.dtype}"
  if max(q.shape[-1], v.shape[-1]) > 512:
    return f"the TPU kernel takes head dimensions up to 512, not {max(q.shape[-1], v.shape[-1])}"
  return None


def attention(q_bthk, k_bthk, v_bthv, decay_h, segment_ids=None, state_bhkv=None, *, block=BLOCK, interpret=False):
  """As `api.lightning_attention`. Inside a shard_map when there is a mesh: the compiler cannot partition the kernel."""
  (batch, length, heads, d_k), d_v = q_bthk.shape, v_bthv.shape[-1]
  if state_bhkv is None:
    state_bhkv = jnp.zeros((batch, heads, d_k, d_v), jnp.float32)
  runs = None if segment_ids is None else run_numbers(segment_ids, (batch, length))
  rate = jnp.log(decay_h.astype(jnp.float32))
  return _attention(q_bthk, k_bthk, v_bthv, rate, runs, state_bhkv, block, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(q, k, v, rate, runs, state, block, interpret):
  return _forward(q, k, v, rate, runs, state, block, interpret)


def _attention_fwd(q, k, v, rate, runs, state, block, interpret):
  return _forward(q, k, v, rate, runs, state, block, interpret), (q, k, v, rate, runs, state)


def _attention_bwd(block, interpret, residuals, cotangents):
  q, k, v, rate, runs, state = residuals
  dout, dfinal = cotangents
  # dq_t = sum over s <= t of decay^(t-s) (dout_t . v_s) k_s: the forward pass of (dout, v, k), and of the state turned
  dq, _ = _forward(dout, v, k, rate, runs, state.swapaxes(2, 3), block, interpret, dtype=q.dtype)
  dk, dv, dstate = _backward(q, k, v, dout, rate, runs, dfinal, block, interpret)
  return dq, dk, dv, jnp.zeros_like(rate), None, dstate


_attention.defvjp(_attention_fwd, _attention_bwd)


class _Shape(NamedTuple):
  """What a kernel is made for."""

  length: int
  group: int  # heads of a program
  d_k: int
  d_v: int
  block: int
  chunk: int
  packed: bool  # there are several runs a row

  @property
  def ragged(self) -> bool:
    return self.length % self.block != 0


def _shape(q, v, runs, block) -> _Shape:
  length, heads = q.shape[1:3]
  d_k, d_v = q.shape[3], v.shape[3]
  # as many heads as fill whole lanes of every operand; all, if no fewer do
  group = math.lcm(LANES // math.gcd(LANES, d_k), LANES // math.gcd(LANES, d_v))
  group = group if heads % group == 0 else heads
  return _Shape(length, group, d_k, d_v, block, CHUNK, runs is not None)


def _forward(q, k, v, rate, runs, state, block, interpret, dtype=None):
  """(out in `dtype`, final state)."""
  s = _shape(q, v, runs, block)
  batch, length, heads, _ = q.shape
  blocks, groups = pl.cdiv(length, s.block), heads // s.group
  rows = lambda d: pl.BlockSpec((1, s.block, s.group * d), lambda b, g, j: (b, j, g))
  state_spec = pl.BlockSpec((1, s.group, s.d_k, s.d_v), lambda b, g, j: (b, g, 0, 0))
  in_specs = [pl.BlockSpec(memory_space=pltpu.SMEM), rows(s.d_k), rows(s.d_k), rows(s.d_v), state_spec]
  operands = [rate, _flat(q), _flat(k), _flat(v), state.astype(jnp.float32)]
  if s.packed:
    in_specs.append(pl.BlockSpec((1, 1, s.block), lambda b, g, j: (b, 0, j)))
    operands.append(runs[:, None])
  out, final = pl.pallas_call(
    functools.partial(_forward_kernel, s),
    grid=(batch, groups, blocks),
    in_specs=in_specs,
    out_specs=[rows(s.d_v), state_spec],
    out_shape=[
      jax.ShapeDtypeStruct((batch, length, heads * s.d_v), dtype or q.dtype),
      jax.ShapeDtypeStruct(state.shape, jnp.float32),
    ],
    scratch_shapes=_scratch(s),
    compiler_params=_PARAMS,
    cost_estimate=_cost(batch, heads, s, q.dtype, products=1),
    interpret=interpret,
    name="lightning_attention_fwd",
  )(*operands)
  return out.reshape(batch, length, heads, s.d_v), final


def _backward(q, k, v, dout, rate, runs, dfinal, block, interpret):
  """(dk, dv, gradient of the initial state), from the last block to the first."""
  s = _shape(q, v, runs, block)
  batch, length, heads, _ = q.shape
  blocks, groups = pl.cdiv(length, s.block), heads // s.group
  rows = lambda d: pl.BlockSpec((1, s.block, s.group * d), lambda b, g, j: (b, blocks - 1 - j, g))
  state_spec = pl.BlockSpec((1, s.group, s.d_k, s.d_v), lambda b, g, j: (b, g, 0, 0))
  in_specs = [pl.BlockSpec(memory_space=pltpu.SMEM), rows(s.d_k), rows(s.d_k), rows(s.d_v), rows(s.d_v), state_spec]
  operands = [rate, _flat(q), _flat(k), _flat(v), _flat(dout), dfinal.astype(jnp.float32)]
  if s.packed:
    # of each block also the run before it and the one after it: its neighbours' tokens are not at hand
    in_specs.append(pl.BlockSpec((1, 1, s.block), lambda b, g, j: (b, 0, blocks - 1 - j)))
    in_specs.append(pl.BlockSpec((1, 1, blocks + 1), lambda b, g, j: (b, 0, 0), memory_space=pltpu.SMEM))
    operands += [runs[:, None], _runs_at_ends(runs, s.block)]
  dk, dv, dstate = pl.pallas_call(
    functools.partial(_backward_kernel, s, blocks),
    grid=(batch, groups, blocks),
    in_specs=in_specs,
    out_specs=[rows(s.d_k), rows(s.d_v), state_spec],
    out_shape=[
      jax.ShapeDtypeStruct((batch, length, heads * s.d_k), k.dtype),
      jax.ShapeDtypeStruct((batch, length, heads * s.d_v), v.dtype),
      jax.ShapeDtypeStruct(dfinal.shape, jnp.float32),
    ],
    scratch_shapes=_scratch(s)[:-1],
    compiler_params=_PARAMS,
    cost_estimate=_cost(batch, heads, s, q.dtype, products=2),
    interpret=interpret,
    name="lightning_attention_bwd",
  )(*operands)
  return dk.reshape(k.shape), dv.reshape(v.shape), dstate


_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _flat(x):
  """[batch, length, heads, d] -> [batch, length, heads * d]: the same bytes."""
  return x.reshape(*x.shape[:2], -1)


def _scratch(s: _Shape):
  """The state; powers of the decay by head: within a chunk, entering and leaving it; the run that the state is of."""
  return [
    pltpu.VMEM((s.group, s.d_k, s.d_v), jnp.float32),
    pltpu.VMEM((s.group, s.chunk, s.chunk), jnp.float32),
    pltpu.VMEM((s.group, s.chunk, LANES), jnp.float32),
    pltpu.VMEM((s.group, s.chunk, LANES), jnp.float32),
    pltpu.SMEM((1,), jnp.int32),
  ]


def _cost(batch, heads, s: _Shape, dtype, products: int) -> pl.CostEstimate:
  tokens = batch * heads * s.length
  flops = 2 * products * tokens * (s.chunk * (s.d_k + s.d_v) + 2 * s.d_k * s.d_v)
  size = jnp.dtype(dtype).itemsize
  moved = tokens * size * (2 * s.d_k + 2 * s.d_v if products == 1 else 3 * s.d_k + 3 * s.d_v)
  return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)


def _power(rate, n):
  """decay^n for an int32 array n; 0 where n is negative: masked before the exponential."""
  return jnp.where(n >= 0, jnp.exp(rate * jnp.maximum(n, 0).astype(jnp.float32)), 0.0)


def _iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _make_powers(s: _Shape, rates, within_ref, enter_ref, leave_ref):
  c = s.chunk
  for i, rate in enumerate(rates):
    within_ref[i] = _power(rate, _iota((c, c), 0) - _iota((c, c), 1))
    enter_ref[i] = _power(rate, _iota((c, LANES), 0) + 1)
    leave_ref[i] = _power(rate, c - 1 - _iota((c, LANES), 0))


def _wide(x, d: int):
  """[rows, LANES] of equal columns -> [rows, d]."""
  if d == LANES:
    return x
  return jnp.concatenate([x] * (d // LANES), axis=1) if d % LANES == 0 else jnp.broadcast_to(x[:, :1], (x.shape[0], d))


def _halves(x):
  """float32 -> (nearest bfloat16, the bfloat16 nearest to what that leaves)."""
  high = x.astype(jnp.bfloat16)
  return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _dot(a, b, contract, exact):
  """a b in float32, contracting a's and b's axes `contract`."""
  precision = jax.lax.Precision.HIGHEST if exact else None
  numbers = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def _split_dot(wide, narrow, contract, exact):
  """`wide` float32 times `narrow` of the operands' dtype, as if not rounded: by halves along the contraction."""
  if exact:
    return _dot(wide, narrow, contract, True)
  wide = jnp.concatenate(_halves(wide), axis=contract[0])
  return _dot(wide, jnp.concatenate([narrow, narrow], axis=contract[1]), contract, False)


class _Chunk(NamedTuple):
  """Powers and masks of one chunk and head."""

  within: jax.Array  # [r, s]
  enter: jax.Array  # [r, LANES]
  leave: jax.Array  # [s, LANES]
  whole: jax.Array  # scalar


def _chunk(s: _Shape, i, rate, start, runs, before, after, within_ref, enter_ref, leave_ref) -> _Chunk:
  """start: of the chunk in the row; runs: int32 [1, chunk] or None; before, after: the state's run on either side."""
  c = s.chunk
  within, enter, leave, whole = within_ref[i], enter_ref[i], leave_ref[i], jnp.exp(rate * c)
  if s.ragged:
    count = jnp.clip(s.length - start, 0, c)
    leave = _power(rate, count - 1 - _iota((c, LANES), 0))
    whole = jnp.exp(rate * count.astype(jnp.float32))
  if runs is not None:
    across = jnp.broadcast_to(runs, (c, c))
    down = across.T
    column = jnp.broadcast_to(down[:, :1], (c, LANES))
    within = jnp.where(across == down, within, 0.0)
    enter = jnp.where(column == before, enter, 0.0)
    leave = jnp.where(column == after, leave, 0.0)
    whole = jnp.where(before == after, whole, 0.0)
  return _Chunk(within, enter, leave, whole)


def _tokens(s: _Shape, ref, n, i, d, start):
  """Chunk n of head i of a block; zeros beyond the row's end, where anything may stand."""
  x = ref[0, pl.ds(n * s.chunk, s.chunk), i * d : (i + 1) * d]
  if s.ragged:
    x = jnp.where(start + _iota(x.shape, 0) < s.length, x, jnp.zeros_like(x))
  return x


AHEAD = 3


def _ahead(heads, chunks, prepare, finish, acc_ref):
  """The chunks of every head in turn, each prepared `AHEAD` chunks before the state gets there.

  So that the matrix units have other work while the state goes from chunk to chunk.
  """
  states = [acc_ref[i] for i in range(heads)]
  steps = [(i, n) for n in chunks for i in range(heads)]
  waiting = [prepare(*step) for step in steps[:AHEAD]]
  for at, (i, n) in enumerate(steps):
    if at + AHEAD < len(steps):
      waiting.append(prepare(*steps[at + AHEAD]))
    states[i] = finish(i, n, states[i], *waiting.pop(0))
  for i, state in enumerate(states):
    acc_ref[i] = state


def _forward_kernel(s: _Shape, rate_ref, q_ref, k_ref, v_ref, state_ref, *rest):
  runs_ref = rest[0] if s.packed else None
  out_ref, final_ref, acc_ref, within_ref, enter_ref, leave_ref, run_ref = rest[s.packed :]
  j, last = pl.program_id(2), pl.num_programs(2) - 1
  rates = [rate_ref[pl.program_id(1) * s.group + i] for i in range(s.group)]

  @pl.when(j == 0)
  def _():
    acc_ref[...] = state_ref[0]
    _make_powers(s, rates, within_ref, enter_ref, leave_ref)
    run_ref[0] = 0

  exact = q_ref.dtype == jnp.float32
  chunks = range(s.block // s.chunk)
  runs, ends = [None] * len(chunks), [None] * (len(chunks) + 1)
  if s.packed:
    runs, ends = _runs(s, runs_ref, j * s.block, run_ref[0])
    run_ref[0] = ends[-1]

  def prepare(i, n):
    """What needs no state."""
    start = j * s.block + n * s.chunk
    f = _chunk(s, i, rates[i], start, runs[n], ends[n], ends[n + 1], within_ref, enter_ref, leave_ref)
    q, k = _tokens(s, q_ref, n, i, s.d_k, start), _tokens(s, k_ref, n, i, s.d_k, start)
    v = _tokens(s, v_ref, n, i, s.d_v, start)
    scores = _dot(q, k, (1, 1), exact) * f.within
    out = _split_dot(scores, v, (1, 0), exact)
    leaving = _wide(f.leave, s.d_v) * v.astype(jnp.float32)
    return f, q, out, _split_dot_right(k, leaving, (0, 0), exact)

  def finish(i, n, state, f, q, out, more):
    out += _wide(f.enter, s.d_v) * _state_dot(q, state, (1, 0), exact)
    out_ref[0, pl.ds(n * s.chunk, s.chunk), i * s.d_v : (i + 1) * s.d_v] = out.astype(out_ref.dtype)
    return f.whole * state + more

  _ahead(s.group, chunks, prepare, finish, acc_ref)

  @pl.when(j == last)
  def _():
    final_ref[0] = acc_ref[...]


def _runs(s: _Shape, runs_ref, start, before):
  """(int32 [1, chunk] of each chunk of a block, the runs at their ends with `before` in front).

  Beyond the row's end the run is that of its last token.
  """
  runs, ends = [], [before]
  for n in range(s.block // s.chunk):
    here = runs_ref[0, :, n * s.chunk : (n + 1) * s.chunk]
    if s.ragged:
      inside = start + n * s.chunk + _iota(here.shape, 1) < s.length
      here = jnp.where(inside, here, jnp.max(jnp.where(inside, here, ends[-1])))  # numbers rise along the row
    runs.append(here)
    ends.append(jnp.max(here))
  return runs, ends


def _runs_at_ends(runs, block):
  """[batch, length] -> [batch, 1, blocks + 1]: the run before each block, and that after the last."""
  length = runs.shape[1]
  ends = jnp.minimum(block * jnp.arange(1, pl.cdiv(length, block) + 1), length) - 1
  return jnp.concatenate([runs[:, :1], runs[:, ends]], axis=1)[:, None]


def _state_dot(x, state, contract, exact):
  """x times the float32 state."""
  if exact:
    return _dot(x, state, contract, True)
  high, low = _halves(state)
  return _dot(x, high, contract, False) + _dot(x, low, contract, False)


def _split_dot_right(narrow, wide, contract, exact):
  """As `_split_dot`, the other way around."""
  if exact:
    return _dot(narrow, wide, contract, True)
  wide = jnp.concatenate(_halves(wide), axis=contract[1])
  return _dot(jnp.concatenate([narrow, narrow], axis=contract[0]), wide, contract, False)


def _backward_kernel(s: _Shape, blocks, rate_ref, q_ref, k_ref, v_ref, dout_ref, dfinal_ref, *rest):
  runs_ref, ends_ref = rest[:2] if s.packed else (None, None)
  dk_ref, dv_ref, dstate_ref, acc_ref, within_ref, enter_ref, leave_ref = rest[2 * s.packed :]
  j, last = pl.program_id(2), pl.num_programs(2) - 1
  rates = [rate_ref[pl.program_id(1) * s.group + i] for i in range(s.group)]

  @pl.when(j == 0)
  def _():
    acc_ref[...] = dfinal_ref[0]
    _make_powers(s, rates, within_ref, enter_ref, leave_ref)

  exact = q_ref.dtype == jnp.float32
  at = blocks - 1 - j
  chunks = range(s.block // s.chunk)
  runs, ends = [None] * len(chunks), [None] * (len(chunks) + 1)
  if s.packed:
    runs, ends = _runs(s, runs_ref, at * s.block, ends_ref[0, 0, at])

  def prepare(i, n):
    start = at * s.block + n * s.chunk
    f = _chunk(s, i, rates[i], start, runs[n], ends[n], ends[n + 1], within_ref, enter_ref, leave_ref)
    q, k = _tokens(s, q_ref, n, i, s.d_k, start), _tokens(s, k_ref, n, i, s.d_k, start)
    v, dout = _tokens(s, v_ref, n, i, s.d_v, start), _tokens(s, dout_ref, n, i, s.d_v, start)
    scores = _dot(q, k, (1, 1), exact) * f.within
    dscores = _dot(dout, v, (1, 1), exact) * f.within
    dk, dv = _split_dot(dscores, q, (0, 0), exact), _split_dot(scores, dout, (0, 0), exact)
    entering = _wide(f.enter, s.d_v) * dout.astype(jnp.float32)
    return f, k, v, dk, dv, _split_dot_right(q, entering, (0, 0), exact)

  def finish(i, n, dstate, f, k, v, dk, dv, more):
    rows = pl.ds(n * s.chunk, s.chunk)
    dk += _wide(f.leave, s.d_k) * _state_dot(v, dstate, (1, 1), exact)
    dv += _wide(f.leave, s.d_v) * _state_dot(k, dstate, (1, 0), exact)
    dk_ref[0, rows, i * s.d_k : (i + 1) * s.d_k] = dk.astype(dk_ref.dtype)
    dv_ref[0, rows, i * s.d_v : (i + 1) * s.d_v] = dv.astype(dv_ref.dtype)
    return f.whole * dstate + more

  _ahead(s.group, chunks[::-1], prepare, finish, acc_ref)

  @pl.when(j == last)
  def _():
    dstate_ref[0] = acc_ref[...]
