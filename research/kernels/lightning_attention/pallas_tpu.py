"""Linear attention with decay on TPUs: one kernel a direction, the state in VMEM from the first token to the last.

The mathematics is that of xla.py. A grid step takes a block of tokens of a few heads, straight
from [batch, length, heads * d]: no transpose is needed before or after. In it the chunks of
`CHUNK` tokens are unrolled; the decay's powers are made once a head.

What is rounded to bfloat16 for the matrix units is split in two, its upper 16 bits and the
rest: scores, scaled values and the state then carry 16 bits, and the result is as exact as
its own rounding. The halves stand side by side along the contraction, where a chunk of 64
fills half a matrix unit only.

Matrix units are the bottleneck, so the schedule is made for them: states and scores run ahead
of the outputs and wait for them in VMEM, already split, where they take no registers.
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
BLOCK = 1024  # tokens of a grid step, of one bfloat16 head of 128
FORWARD_AHEAD, BACKWARD_AHEAD = 2, 1  # chunks: fewer leave the matrix units idle, more spill registers


def obstacle(q, v) -> str | None:
  """Why this cannot run the call; None if it can."""
  if dispatch.platform() != "tpu":
    return f"the TPU kernel needs a TPU, and this runs on {dispatch.platform()}"
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    return f"the TPU kernel takes bfloat16 or float32, not {q.dtype}"
  if max(q.shape[-1], v.shape[-1]) > 512:
    return f"the TPU kernel takes head dimensions up to 512, not {max(q.shape[-1], v.shape[-1])}"
  return None


def attention(q_bthk, k_bthk, v_bthv, decay_h, segment_ids=None, state_bhkv=None, *, block=None, interpret=False):
  """As `api.lightning_attention`. Inside a shard_map when there is a mesh: the compiler cannot partition the kernel.

  block: most tokens of a grid step, a multiple of 128; None: as many as keep its unrolled program to one size.
  """
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
  dtype: jnp.dtype

  @property
  def ragged(self) -> bool:
    return self.length % self.block != 0

  @property
  def parts(self) -> int:
    """How many operands of the matrix units a float32 array is split into."""
    return 1 if self.dtype == jnp.float32 else 2


def _shape(q, v, runs, block) -> _Shape:
  length, heads = q.shape[1:3]
  d_k, d_v = q.shape[3], v.shape[3]
  # as many heads as fill whole lanes of every operand; all, if no fewer do
  group = math.lcm(LANES // math.gcd(LANES, d_k), LANES // math.gcd(LANES, d_v))
  group = group if heads % group == 0 else heads
  if block is None:
    block = max(LANES, BLOCK * LANES * 2 // (group * max(d_k, d_v, LANES) * q.dtype.itemsize) // LANES * LANES)
  blocks = pl.cdiv(length, block)  # of one size, as far as lanes allow
  block = LANES * pl.cdiv(length, LANES * blocks)
  return _Shape(length, group, d_k, d_v, block, CHUNK, runs is not None, q.dtype)


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
    scratch_shapes=[*_scratch(s, FORWARD_AHEAD, scores=1), pltpu.SMEM((1,), jnp.int32)],  # and the state's run
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
    ends = jnp.minimum(s.block * jnp.arange(1, blocks + 1), length) - 1
    operands += [runs[:, None], jnp.concatenate([runs[:, :1], runs[:, ends]], axis=1)[:, None]]
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
    scratch_shapes=_scratch(s, BACKWARD_AHEAD, scores=2),
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


def _scratch(s: _Shape, ahead: int, scores: int):
  """By head: the state; powers of the decay within a chunk, entering and leaving it; states and scores that wait."""
  ring = ahead + 2
  return [
    pltpu.VMEM((s.group, s.d_k, s.d_v), jnp.float32),
    pltpu.VMEM((s.group, s.chunk, s.parts * s.chunk), jnp.float32),
    pltpu.VMEM((s.group, s.chunk, LANES), jnp.float32),
    pltpu.VMEM((s.group, s.chunk, LANES), jnp.float32),
    pltpu.VMEM((s.group, ring, s.parts, s.d_k, s.d_v), s.dtype),
    *[pltpu.VMEM((s.group, ring, s.chunk, s.parts * s.chunk), s.dtype)] * scores,
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


def _make_powers(s: _Shape, rates, within_ref, enter_ref, leave_ref, turned=False):
  """turned: within a chunk, rows are the tokens attended to and columns those that attend."""
  c = s.chunk
  for i, rate in enumerate(rates):
    apart = _iota((c, s.parts * c), 0) - _iota((c, s.parts * c), 1) % c
    within_ref[i] = _power(rate, -apart if turned else apart)
    enter_ref[i] = _power(rate, _iota((c, LANES), 0) + 1)
    leave_ref[i] = _power(rate, c - 1 - _iota((c, LANES), 0))


def _wide(x, d: int):
  """[rows, LANES] of equal columns -> [rows, d]."""
  if d == LANES:
    return x
  return jnp.concatenate([x] * (d // LANES), axis=1) if d % LANES == 0 else jnp.broadcast_to(x[:, :1], (x.shape[0], d))


def _halves(x):
  """float32 -> (its upper 16 bits, the rest). Both float32: to go there and back through bfloat16 costs packing."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16))
  high = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return high, x - high


def _split(x, axis: int, dtype):
  """float32 for the matrix units: itself, or its halves in bfloat16 one after the other along `axis`."""
  return x if dtype == jnp.float32 else jnp.concatenate(_halves(x), axis=axis).astype(dtype)


def _twice(x, axis: int):
  """What meets `_split` in a product."""
  return x if x.dtype == jnp.float32 else jnp.concatenate([x, x], axis=axis)


def _dot(a, b, contract):
  """a b in float32, contracting a's and b's axes `contract`."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  numbers = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def _scores(a, b, f):
  """[rows of a, those of b] times the powers within the chunk; split: the halves side by side."""
  scores = _dot(a, _twice(b, 0), (1, 1)) * f.within
  if a.dtype == jnp.float32:
    return scores
  high, low = _halves(scores)
  return jnp.where(_iota(scores.shape, 1) < scores.shape[1] // 2, high, low).astype(a.dtype)


def _park(ref, state):
  """A state for `_state_dot`: [parts, d_k, d_v]."""
  for part, half in enumerate(_halves(state) if ref.shape[0] == 2 else [state]):
    ref[part] = half.astype(ref.dtype)


def _state_dot(x, ref, contract):
  """x times the state parked in `ref`."""
  return sum(_dot(x, ref[part], contract) for part in range(ref.shape[0]))


class _Chunk(NamedTuple):
  """Powers and masks of one chunk and head."""

  within: jax.Array  # [r, parts s]
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
    down = jnp.broadcast_to(runs, (c, c)).T[:, :1]
    across = jnp.broadcast_to(jnp.concatenate([runs] * s.parts, axis=1), within.shape)
    column = jnp.broadcast_to(down, (c, LANES))
    within = jnp.where(across == jnp.broadcast_to(down, within.shape), within, 0.0)
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


def _ahead(ahead, heads, chunks, prepare, finish):
  """The chunks of every head in turn, each prepared `ahead` chunks before it is finished.

  So that the matrix units have other work while a chunk's scores and state are made for them.
  """
  steps = [(i, n) for n in chunks for i in range(heads)]
  for step in steps[:ahead]:
    prepare(*step)
  for at, step in enumerate(steps):
    if at + ahead < len(steps):
      prepare(*steps[at + ahead])
    finish(*step)


def _forward_kernel(s: _Shape, rate_ref, q_ref, k_ref, v_ref, state_ref, *rest):
  runs_ref = rest[0] if s.packed else None
  out_ref, final_ref, acc_ref, *powers, states_ref, scores_ref, run_ref = rest[s.packed :]
  j, last = pl.program_id(2), pl.num_programs(2) - 1
  rates = [rate_ref[pl.program_id(1) * s.group + i] for i in range(s.group)]

  @pl.when(j == 0)
  def _():
    acc_ref[...] = state_ref[0]
    _make_powers(s, rates, *powers)
    run_ref[0] = 0

  chunks, ring = range(s.block // s.chunk), states_ref.shape[1]
  runs, ends = [None] * len(chunks), [None] * (len(chunks) + 1)
  if s.packed:
    runs, ends = _runs(s, runs_ref, j * s.block, run_ref[0])
    run_ref[0] = ends[-1]
  start = lambda n: j * s.block + n * s.chunk
  chunk = lambda i, n: _chunk(s, i, rates[i], start(n), runs[n], ends[n], ends[n + 1], *powers)
  tokens = lambda ref, i, n, d: _tokens(s, ref, n, i, d, start(n))
  for i in range(s.group):
    _park(states_ref.at[i, 0], acc_ref[i])

  def prepare(i, n):
    """Scores, and the state after the chunk."""
    f, k = chunk(i, n), tokens(k_ref, i, n, s.d_k)
    scores_ref[i, n % ring] = _scores(tokens(q_ref, i, n, s.d_k), k, f)
    leaving = _wide(f.leave, s.d_v) * tokens(v_ref, i, n, s.d_v).astype(jnp.float32)
    acc_ref[i] = state = f.whole * acc_ref[i] + _dot(_twice(k, 0), _split(leaving, 0, s.dtype), (0, 0))
    if n != chunks[-1]:
      _park(states_ref.at[i, (n + 1) % ring], state)

  def finish(i, n):
    q = tokens(q_ref, i, n, s.d_k)
    out = _wide(chunk(i, n).enter, s.d_v) * _state_dot(q, states_ref.at[i, n % ring], (1, 0))
    out += _dot(scores_ref[i, n % ring], _twice(tokens(v_ref, i, n, s.d_v), 0), (1, 0))
    out_ref[0, pl.ds(n * s.chunk, s.chunk), i * s.d_v : (i + 1) * s.d_v] = out.astype(out_ref.dtype)

  _ahead(FORWARD_AHEAD, s.group, chunks, prepare, finish)

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


def _backward_kernel(s: _Shape, blocks, rate_ref, q_ref, k_ref, v_ref, dout_ref, dfinal_ref, *rest):
  runs_ref, ends_ref = rest[:2] if s.packed else (None, None)
  dk_ref, dv_ref, dstate_ref, acc_ref, *powers, states_ref, scores_ref, dscores_ref = rest[2 * s.packed :]
  j, last = pl.program_id(2), pl.num_programs(2) - 1
  rates = [rate_ref[pl.program_id(1) * s.group + i] for i in range(s.group)]

  @pl.when(j == 0)
  def _():
    acc_ref[...] = dfinal_ref[0]
    _make_powers(s, rates, *powers, turned=True)

  at = blocks - 1 - j
  chunks, ring = range(s.block // s.chunk), states_ref.shape[1]
  runs, ends = [None] * len(chunks), [None] * (len(chunks) + 1)
  if s.packed:
    runs, ends = _runs(s, runs_ref, at * s.block, ends_ref[0, 0, at])
  start = lambda n: at * s.block + n * s.chunk
  chunk = lambda i, n: _chunk(s, i, rates[i], start(n), runs[n], ends[n], ends[n + 1], *powers)
  tokens = lambda ref, i, n, d: _tokens(s, ref, n, i, d, start(n))
  for i in range(s.group):
    _park(states_ref.at[i, chunks[-1] % ring], acc_ref[i])

  def prepare(i, n):
    """Scores and their gradient, both turned, and the state's gradient before the chunk."""
    f, q, dout = chunk(i, n), tokens(q_ref, i, n, s.d_k), tokens(dout_ref, i, n, s.d_v)
    scores_ref[i, n % ring] = _scores(tokens(k_ref, i, n, s.d_k), q, f)
    dscores_ref[i, n % ring] = _scores(tokens(v_ref, i, n, s.d_v), dout, f)
    entering = _wide(f.enter, s.d_v) * dout.astype(jnp.float32)
    acc_ref[i] = dstate = f.whole * acc_ref[i] + _dot(_twice(q, 0), _split(entering, 0, s.dtype), (0, 0))
    if n:
      _park(states_ref.at[i, (n - 1) % ring], dstate)

  def finish(i, n):
    f, rows, dstate = chunk(i, n), pl.ds(n * s.chunk, s.chunk), states_ref.at[i, n % ring]
    dk = _wide(f.leave, s.d_k) * _state_dot(tokens(v_ref, i, n, s.d_v), dstate, (1, 1))
    dv = _wide(f.leave, s.d_v) * _state_dot(tokens(k_ref, i, n, s.d_k), dstate, (1, 0))
    dk += _dot(dscores_ref[i, n % ring], _twice(tokens(q_ref, i, n, s.d_k), 0), (1, 0))
    dv += _dot(scores_ref[i, n % ring], _twice(tokens(dout_ref, i, n, s.d_v), 0), (1, 0))
    dk_ref[0, rows, i * s.d_k : (i + 1) * s.d_k] = dk.astype(dk_ref.dtype)
    dv_ref[0, rows, i * s.d_v : (i + 1) * s.d_v] = dv.astype(dv_ref.dtype)

  _ahead(BACKWARD_AHEAD, s.group, chunks[::-1], prepare, finish)

  @pl.when(j == last)
  def _():
    dstate_ref[0] = acc_ref[...]
