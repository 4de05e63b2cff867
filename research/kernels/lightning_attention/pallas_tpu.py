"""Linear attention with decay on TPUs: one kernel a direction, the state in VMEM from the first token to the last.

The mathematics is that of xla.py. A grid step takes a block of tokens of a few heads, straight
from [batch, length, heads * d]: no transpose is needed before or after. In it the chunks of
`CHUNK` tokens are unrolled; the decay's powers are made once a head.

Matrix units are the bottleneck (tpu_products.py), so the schedule is made for them: states and
scores run ahead of the outputs and wait for them in VMEM, already split, where they take no registers.
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
from research.kernels.lightning_attention.tpu_products import (
  LANES,
  iota,
  outer,
  park,
  scores_dot,
  state_dot,
  write_scores,
)

CHUNK = 64  # tokens between two states
LARGEST_GROUP = 1024  # numbers a token of the heads that a program has: it is unrolled over them
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
  batch, length, heads, _ = q.shape
  local = lambda x: jax.ShapeDtypeStruct((batch, length, heads // dispatch.axis_size("model"), x.shape[-1]), x.dtype)
  s = _shape(local(q), local(v), None, None)
  if s.group * max(s.d_k, s.d_v) > LARGEST_GROUP:
    return f"the TPU kernel cannot hold {s.heads} heads of {q.shape[-1]} together, and no fewer fill whole lanes"
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
  group: int  # units of a program
  joint: int  # heads of a unit: two that share lanes are one, with zeros where one meets the other
  d_k: int  # of a unit
  d_v: int
  block: int
  chunk: int
  packed: bool  # there are several runs a row
  dtype: jnp.dtype

  @property
  def ragged(self) -> bool:
    return self.length % self.block != 0

  @property
  def heads(self) -> int:
    """Of a program."""
    return self.group * self.joint

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
  joint = 2 if group == 2 and d_k == d_v == LANES // 2 == CHUNK else 1
  group, d_k, d_v = group // joint, joint * d_k, joint * d_v
  if block is None:
    block = max(LANES, BLOCK * LANES * 2 // (group * max(d_k, d_v, LANES) * q.dtype.itemsize) // LANES * LANES)
  blocks = pl.cdiv(length, block)  # of one size, as far as lanes allow
  block = LANES * pl.cdiv(length, LANES * blocks)
  return _Shape(length, group, joint, d_k, d_v, block, CHUNK, runs is not None, q.dtype)


def _forward(q, k, v, rate, runs, state, block, interpret, dtype=None):
  """(out in `dtype`, final state)."""
  s = _shape(q, v, runs, block)
  batch, length, heads, _ = q.shape
  blocks, groups = pl.cdiv(length, s.block), heads // s.heads
  rows = lambda d: pl.BlockSpec((1, s.block, s.group * d), lambda b, g, j: (b, j, g))
  state_spec = pl.BlockSpec((1, s.heads, *state.shape[2:]), lambda b, g, j: (b, g, 0, 0))
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
      jax.ShapeDtypeStruct((batch, length, heads * v.shape[3]), dtype or q.dtype),
      jax.ShapeDtypeStruct(state.shape, jnp.float32),
    ],
    scratch_shapes=[*_scratch(s, FORWARD_AHEAD, scores=1), pltpu.SMEM((1,), jnp.int32)],  # and the state's run
    compiler_params=PARAMS,
    cost_estimate=_cost(batch, heads // s.joint, s, q.dtype, products=1),
    interpret=interpret,
    name="lightning_attention_fwd",
  )(*operands)
  return out.reshape(v.shape), final


def _backward(q, k, v, dout, rate, runs, dfinal, block, interpret):
  """(dk, dv, gradient of the initial state), from the last block to the first."""
  s = _shape(q, v, runs, block)
  batch, length, heads, _ = q.shape
  blocks, groups = pl.cdiv(length, s.block), heads // s.heads
  rows = lambda d: pl.BlockSpec((1, s.block, s.group * d), lambda b, g, j: (b, blocks - 1 - j, g))
  state_spec = pl.BlockSpec((1, s.heads, *dfinal.shape[2:]), lambda b, g, j: (b, g, 0, 0))
  in_specs = [pl.BlockSpec(memory_space=pltpu.SMEM), rows(s.d_k), rows(s.d_k), rows(s.d_v), rows(s.d_v), state_spec]
  operands = [rate, _flat(q), _flat(k), _flat(v), _flat(dout), dfinal.astype(jnp.float32)]
  if s.packed:
    # of each block also the run before it and the one after it: its neighbours' tokens are not at hand
    in_specs.append(pl.BlockSpec((1, 1, s.block), lambda b, g, j: (b, 0, blocks - 1 - j)))
    in_specs.append(pl.BlockSpec((1, 1, blocks + 1), lambda b, g, j: (b, 0, 0), memory_space=pltpu.SMEM))
    operands += [runs[:, None], runs_at_ends(runs, s.block)]
  dk, dv, dstate = pl.pallas_call(
    functools.partial(_backward_kernel, s, blocks),
    grid=(batch, groups, blocks),
    in_specs=in_specs,
    out_specs=[rows(s.d_k), rows(s.d_v), state_spec],
    out_shape=[
      jax.ShapeDtypeStruct((batch, length, heads * k.shape[3]), k.dtype),
      jax.ShapeDtypeStruct((batch, length, heads * v.shape[3]), v.dtype),
      jax.ShapeDtypeStruct(dfinal.shape, jnp.float32),
    ],
    scratch_shapes=_scratch(s, BACKWARD_AHEAD, scores=2),
    compiler_params=PARAMS,
    cost_estimate=_cost(batch, heads // s.joint, s, q.dtype, products=2),
    interpret=interpret,
    name="lightning_attention_bwd",
  )(*operands)
  return dk.reshape(k.shape), dv.reshape(v.shape), dstate


PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _flat(x):
  """[batch, length, heads, d] -> [batch, length, heads * d]: the same bytes."""
  return x.reshape(*x.shape[:2], -1)


def _scratch(s: _Shape, ahead: int, scores: int):
  """By unit: the state; powers of the decay within a chunk, entering and leaving it; states and scores that wait."""
  ring, columns = ahead + 2, s.chunk * (s.parts if s.joint == 1 else s.joint)
  return [
    pltpu.VMEM((s.group, s.d_k, s.d_v), jnp.float32),
    pltpu.VMEM((s.group, s.chunk, columns), jnp.float32),
    pltpu.VMEM((s.group, s.chunk, LANES), jnp.float32),
    pltpu.VMEM((s.group, s.chunk, LANES), jnp.float32),
    pltpu.VMEM((s.group, ring, s.parts, s.d_k, s.d_v), s.dtype),
    *[pltpu.VMEM((s.group, ring, 1 if s.joint == 1 else s.parts, s.chunk, columns), s.dtype)] * scores,
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


def _rates(s: _Shape, rate_ref):
  """Of each unit: a scalar, or [1, LANES] by lane; two heads share the columns of their scores as they do lanes."""
  rates = [rate_ref[pl.program_id(1) * s.heads + h] for h in range(s.heads)]
  if s.joint == 1:
    return rates
  return [jnp.where(iota((1, LANES), 1) < LANES // 2, *rates[h : h + 2]) for h in range(0, s.heads, 2)]


def make_powers(s: _Shape, rates, within_ref, enter_ref, leave_ref, turned=False):
  """turned: within a chunk, rows are the tokens attended to and columns those that attend."""
  c, shape = s.chunk, within_ref.shape[1:]
  for i, rate in enumerate(rates):
    apart = iota(shape, 0) - iota(shape, 1) % c
    within_ref[i] = _power(rate, -apart if turned else apart)
    enter_ref[i] = _power(rate, iota((c, LANES), 0) + 1)
    leave_ref[i] = _power(rate, c - 1 - iota((c, LANES), 0))


def wide(x, d: int):
  """[rows, LANES] of equal columns -> [rows, d]."""
  if d == LANES:
    return x
  return jnp.concatenate([x] * (d // LANES), axis=1) if d % LANES == 0 else jnp.broadcast_to(x[:, :1], (x.shape[0], d))


def _heads(s: _Shape, acc_ref):
  """Where the state of each head of a program stands."""
  d_k, d_v = s.d_k // s.joint, s.d_v // s.joint
  return [acc_ref.at[i, pl.ds(a * d_k, d_k), pl.ds(a * d_v, d_v)] for i in range(s.group) for a in range(s.joint)]


class _Chunk(NamedTuple):
  """Powers and masks of one chunk and head."""

  within: jax.Array  # [r, columns]
  enter: jax.Array  # [r, LANES]
  leave: jax.Array  # [s, LANES]
  whole: jax.Array  # scalar, or [1, LANES]


def powers_of(s: _Shape, i, rate, start, runs, before, after, within_ref, enter_ref, leave_ref) -> _Chunk:
  """start: of the chunk in the row; runs: int32 [1, chunk] or None; before, after: the state's run on either side."""
  c = s.chunk
  within, enter, leave, whole = within_ref[i], enter_ref[i], leave_ref[i], jnp.exp(rate * c)
  if s.ragged:
    count = jnp.clip(s.length - start, 0, c)
    leave = _power(rate, count - 1 - iota((c, LANES), 0))
    whole = jnp.exp(rate * count.astype(jnp.float32))
  if runs is not None:
    down = jnp.broadcast_to(runs, (c, c)).T[:, :1]
    across = jnp.broadcast_to(jnp.concatenate([runs] * (within.shape[1] // c), axis=1), within.shape)
    column = jnp.broadcast_to(down, (c, LANES))
    within = jnp.where(across == jnp.broadcast_to(down, within.shape), within, 0.0)
    enter = jnp.where(column == before, enter, 0.0)
    leave = jnp.where(column == after, leave, 0.0)
    whole *= jnp.where(before == after, 1.0, 0.0)
  return _Chunk(within, enter, leave, whole)


def tokens_of(s: _Shape, ref, n, i, d, start):
  """Chunk n of head i of a block; zeros beyond the row's end, where anything may stand."""
  x = ref[0, pl.ds(n * s.chunk, s.chunk), i * d : (i + 1) * d]
  if s.ragged:
    x = jnp.where(start + iota(x.shape, 0) < s.length, x, jnp.zeros_like(x))
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
  rates = _rates(s, rate_ref)

  @pl.when(j == 0)
  def _():
    acc_ref[...] = jnp.zeros_like(acc_ref)
    for h, ref in enumerate(_heads(s, acc_ref)):
      ref[...] = state_ref[0, h]
    make_powers(s, rates, *powers)
    run_ref[0] = 0

  chunks, ring = range(s.block // s.chunk), states_ref.shape[1]
  runs, ends = [None] * len(chunks), [None] * (len(chunks) + 1)
  if s.packed:
    runs, ends = runs_of(s, runs_ref, j * s.block, run_ref[0])
    run_ref[0] = ends[-1]
  start = lambda n: j * s.block + n * s.chunk
  chunk = lambda i, n: powers_of(s, i, rates[i], start(n), runs[n], ends[n], ends[n + 1], *powers)
  tokens = lambda ref, i, n, d: tokens_of(s, ref, n, i, d, start(n))
  for i in range(s.group):
    park(states_ref.at[i, 0], acc_ref[i])

  def prepare(i, n):
    """Scores, and the state after the chunk."""
    f, k = chunk(i, n), tokens(k_ref, i, n, s.d_k)
    write_scores(s, scores_ref.at[i, n % ring], tokens(q_ref, i, n, s.d_k), k, f)
    leaving = wide(f.leave, s.d_v) * tokens(v_ref, i, n, s.d_v).astype(jnp.float32)
    acc_ref[i] = state = f.whole * acc_ref[i] + outer(s, k, leaving)
    if n != chunks[-1]:
      park(states_ref.at[i, (n + 1) % ring], state)

  def finish(i, n):
    q = tokens(q_ref, i, n, s.d_k)
    out = wide(chunk(i, n).enter, s.d_v) * state_dot(q, states_ref.at[i, n % ring], (1, 0))
    out += scores_dot(s, scores_ref.at[i, n % ring], tokens(v_ref, i, n, s.d_v))
    out_ref[0, pl.ds(n * s.chunk, s.chunk), i * s.d_v : (i + 1) * s.d_v] = out.astype(out_ref.dtype)

  _ahead(FORWARD_AHEAD, s.group, chunks, prepare, finish)

  @pl.when(j == last)
  def _():
    for h, ref in enumerate(_heads(s, acc_ref)):
      final_ref[0, h] = ref[...]


def runs_of(s: _Shape, runs_ref, start, before):
  """(int32 [1, chunk] of each chunk of a block, the runs at their ends with `before` in front).

  Beyond the row's end the run is that of its last token.
  """
  runs, ends = [], [before]
  for n in range(s.block // s.chunk):
    here = runs_ref[0, :, n * s.chunk : (n + 1) * s.chunk]
    if s.ragged:
      inside = start + n * s.chunk + iota(here.shape, 1) < s.length
      here = jnp.where(inside, here, jnp.max(jnp.where(inside, here, ends[-1])))  # numbers rise along the row
    runs.append(here)
    ends.append(jnp.max(here))
  return runs, ends


def runs_at_ends(runs, block):
  """[batch, length] -> [batch, 1, blocks + 1]: the run before each block, and that after the last."""
  length = runs.shape[1]
  ends = jnp.minimum(block * jnp.arange(1, pl.cdiv(length, block) + 1), length) - 1
  return jnp.concatenate([runs[:, :1], runs[:, ends]], axis=1)[:, None]


def _backward_kernel(s: _Shape, blocks, rate_ref, q_ref, k_ref, v_ref, dout_ref, dfinal_ref, *rest):
  runs_ref, ends_ref = rest[:2] if s.packed else (None, None)
  dk_ref, dv_ref, dstate_ref, acc_ref, *powers, states_ref, scores_ref, dscores_ref = rest[2 * s.packed :]
  j, last = pl.program_id(2), pl.num_programs(2) - 1
  rates = _rates(s, rate_ref)

  @pl.when(j == 0)
  def _():
    acc_ref[...] = jnp.zeros_like(acc_ref)
    for h, ref in enumerate(_heads(s, acc_ref)):
      ref[...] = dfinal_ref[0, h]
    make_powers(s, rates, *powers, turned=True)

  at = blocks - 1 - j
  chunks, ring = range(s.block // s.chunk), states_ref.shape[1]
  runs, ends = [None] * len(chunks), [None] * (len(chunks) + 1)
  if s.packed:
    runs, ends = runs_of(s, runs_ref, at * s.block, ends_ref[0, 0, at])
  start = lambda n: at * s.block + n * s.chunk
  chunk = lambda i, n: powers_of(s, i, rates[i], start(n), runs[n], ends[n], ends[n + 1], *powers)
  tokens = lambda ref, i, n, d: tokens_of(s, ref, n, i, d, start(n))
  for i in range(s.group):
    park(states_ref.at[i, chunks[-1] % ring], acc_ref[i])

  def prepare(i, n):
    """Scores and their gradient, both turned, and the state's gradient before the chunk."""
    f, q, dout = chunk(i, n), tokens(q_ref, i, n, s.d_k), tokens(dout_ref, i, n, s.d_v)
    write_scores(s, scores_ref.at[i, n % ring], tokens(k_ref, i, n, s.d_k), q, f)
    write_scores(s, dscores_ref.at[i, n % ring], tokens(v_ref, i, n, s.d_v), dout, f)
    entering = wide(f.enter, s.d_v) * dout.astype(jnp.float32)
    acc_ref[i] = dstate = f.whole * acc_ref[i] + outer(s, q, entering)
    if n:
      park(states_ref.at[i, (n - 1) % ring], dstate)

  def finish(i, n):
    f, rows, dstate = chunk(i, n), pl.ds(n * s.chunk, s.chunk), states_ref.at[i, n % ring]
    dk = wide(f.leave, s.d_k) * state_dot(tokens(v_ref, i, n, s.d_v), dstate, (1, 1))
    dv = wide(f.leave, s.d_v) * state_dot(tokens(k_ref, i, n, s.d_k), dstate, (1, 0))
    dk += scores_dot(s, dscores_ref.at[i, n % ring], tokens(q_ref, i, n, s.d_k))
    dv += scores_dot(s, scores_ref.at[i, n % ring], tokens(dout_ref, i, n, s.d_v))
    dk_ref[0, rows, i * s.d_k : (i + 1) * s.d_k] = dk.astype(dk_ref.dtype)
    dv_ref[0, rows, i * s.d_v : (i + 1) * s.d_v] = dv.astype(dv_ref.dtype)

  _ahead(BACKWARD_AHEAD, s.group, chunks[::-1], prepare, finish)

  @pl.when(j == last)
  def _():
    for h, ref in enumerate(_heads(s, acc_ref)):
      dstate_ref[0, h] = ref[...]
