"""Gated linear attention on TPUs: what stands around the attention is computed where its operands lie anyway.

A head's q, k, v and u are neighbours in the projection's output: a grid step reads a block of it as it is,
and the backward pass writes its gradient in the same order. Only that, the gate's product and a
number a token cross the memory; activations, phases and the attention's own output are made again.

The backward pass is one kernel, from the last block to the first. It begins each block with the state that
the forward pass left there, goes through the block's chunks for their states, and then back.
The chunks are those of pallas_tpu.py.
"""

import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from research.kernels import dispatch
from research.kernels.lightning_attention import pallas_tpu as tpu
from research.kernels.lightning_attention.features import ACTIVATIONS, sin_cos
from research.kernels.lightning_attention.reference import run_numbers
from research.kernels.lightning_attention.tpu_gated_blocks import (
  BUFFERS,
  Shape,
  blocks_of,
  bytes_a_token,
  cost,
  scratch,
  shape_of,
)
from research.kernels.lightning_attention.tpu_products import LANES, dot, iota, outer, split_dot, wide_dot

BLOCK = 1024  # tokens of a grid step at most, and between two states that are kept
TOGETHER = 8  # chunks whose products are interleaved, of one head a block


def obstacle(qkvu, theta) -> str | None:
  """Why this cannot run the call; None if it can."""
  if dispatch.platform() != "tpu":
    return f"the TPU kernel needs a TPU, and this runs on {dispatch.platform()}"
  if qkvu.dtype not in (jnp.bfloat16, jnp.float32):
    return f"the TPU kernel takes bfloat16 or float32, not {qkvu.dtype}"
  most = 256 if theta is None else 128
  if qkvu.shape[-1] > most:
    return f"the TPU kernel takes head dimensions up to {most}{'' if most == 256 else ' with phases'}"
  batch, length, heads, *rest = qkvu.shape
  local = jax.ShapeDtypeStruct((batch, length, heads // dispatch.axis_size("model"), *rest), qkvu.dtype)
  shape = shape_of(local, theta, None, "none", BLOCK)
  if bytes_a_token(shape, qkvu.dtype) * LANES > BUFFERS:
    return f"the TPU kernel cannot hold {shape.group} heads of {shape.d} together, which fill whole lanes"
  return None


def attention(
  qkvu, decay_h, theta_bhd, positions_bt, segment_ids, state_bhkv, *, activation, block=BLOCK, interpret=False
):
  """As `gated.gated_lightning_attention`, with theta for each row. Inside a shard_map when there is a mesh."""
  batch, length, heads, _, d = qkvu.shape
  if state_bhkv is None:
    d_k = d if theta_bhd is None else 2 * d
    state_bhkv = jnp.zeros((batch, heads, d_k, d), jnp.float32)
  if theta_bhd is not None:
    theta_bhd = theta_bhd.astype(jnp.float32)
  runs = None if segment_ids is None else run_numbers(segment_ids, (batch, length))
  rate = jnp.log(decay_h.astype(jnp.float32))
  return _attention(qkvu, rate, theta_bhd, positions_bt, runs, state_bhkv, activation, block, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attention(x, rate, theta, positions, runs, state, activation, block, interpret):
  return _forward(x, rate, theta, positions, runs, state, activation, block, interpret, keep=False)[:3]


def _attention_fwd(x, rate, theta, positions, runs, state, activation, block, interpret):
  *out, kept = _forward(x, rate, theta, positions, runs, state, activation, block, interpret, keep=True)
  return tuple(out), (x, rate, theta, positions, runs, kept)


def _attention_bwd(activation, block, interpret, residuals, cotangents):
  x, rate, theta, positions, runs, kept = residuals
  dx, dstate, dtheta = _backward(x, *cotangents, rate, theta, positions, runs, kept, activation, block, interpret)
  return dx, jnp.zeros_like(rate), dtheta, None, None, dstate


_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(x, rate, theta, positions, runs, state, activation, block, interpret, keep):
  """(gated [batch, length, heads, d], squares [batch, length, heads], final state, states before each block)."""
  s = shape_of(x, theta, runs, activation, block)
  batch, length, heads = x.shape[:3]
  blocks, groups = pl.cdiv(length, s.block), heads // s.group
  on = blocks_of(s, lambda j: j)
  in_specs = [pl.BlockSpec(memory_space=pltpu.SMEM), on.fused, on.state]
  operands = [rate, x.reshape(batch, length, -1), state.astype(jnp.float32)]
  if s.phased:
    in_specs += [on.theta, on.tokens]
    operands += [theta.reshape(batch, groups, s.group, s.d), positions[:, None]]
  if s.packed:
    in_specs.append(on.tokens)
    operands.append(runs[:, None])
  out_specs = [on.out, on.numbers, on.state]
  out_shape = [
    jax.ShapeDtypeStruct((batch, length, heads * s.d), x.dtype),
    jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
    jax.ShapeDtypeStruct(state.shape, jnp.float32),
  ]
  if keep:
    out_specs.append(on.kept)
    out_shape.append(jax.ShapeDtypeStruct((batch, blocks, heads, s.d_k, s.d_v), jnp.float32))
  out, squares, final, *kept = pl.pallas_call(
    functools.partial(_forward_kernel, s, keep),
    grid=(batch, groups, blocks),
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=out_shape,
    scratch_shapes=[*scratch(s), pltpu.SMEM((1,), jnp.int32)],  # and the state's run
    compiler_params=tpu.PARAMS,
    cost_estimate=cost(s, batch * heads, operands, out_shape, within=2, states=2),
    interpret=interpret,
    name="gated_lightning_attention_fwd",
  )(*operands)
  return out.reshape(batch, length, heads, s.d), squares[:, :, 0].swapaxes(1, 2), final, kept[0] if keep else None


def _backward(x, dout, dsquares, dfinal, rate, theta, positions, runs, kept, activation, block, interpret):
  """(gradients of x, of the initial state and of theta or None)."""
  s = shape_of(x, theta, runs, activation, block)
  batch, length, heads = x.shape[:3]
  blocks, groups = pl.cdiv(length, s.block), heads // s.group
  on = blocks_of(s, lambda j: blocks - 1 - j)
  in_specs = [pl.BlockSpec(memory_space=pltpu.SMEM), on.fused, on.out, on.numbers, on.kept, on.state]
  flat = lambda z: z.reshape(batch, length, -1)
  operands = [rate, flat(x), flat(dout), dsquares.swapaxes(1, 2)[:, :, None], kept, dfinal.astype(jnp.float32)]
  if s.phased:
    in_specs += [on.theta, on.tokens]
    operands += [theta.reshape(batch, groups, s.group, s.d), positions[:, None]]
  if s.packed:
    in_specs += [on.tokens, pl.BlockSpec((1, 1, blocks + 1), lambda b, g, j: (b, 0, 0), memory_space=pltpu.SMEM)]
    operands += [runs[:, None], tpu.runs_at_ends(runs, s.block)]
  out_specs = [on.fused, on.state]
  out_shape = [
    jax.ShapeDtypeStruct((batch, length, heads * s.fields * s.d), x.dtype),
    jax.ShapeDtypeStruct(dfinal.shape, jnp.float32),
  ]
  if s.phased:
    out_specs.append(on.theta)
    out_shape.append(jax.ShapeDtypeStruct((batch, groups, s.group, s.d), jnp.float32))
  dx, dstate, *dtheta = pl.pallas_call(
    functools.partial(_backward_kernel, s, blocks),
    grid=(batch, groups, blocks),
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=out_shape,
    scratch_shapes=[*scratch(s), pltpu.VMEM((s.group, len(s.chunks), s.d_k, s.d_v), jnp.float32)],
    compiler_params=tpu.PARAMS,
    cost_estimate=cost(s, batch * heads, operands, out_shape, within=6, states=7),
    interpret=interpret,
    name="gated_lightning_attention_bwd",
  )(*operands)
  return dx.reshape(x.shape), dstate, dtheta[0].reshape(batch, heads, s.d) if s.phased else None


def _in_step(makers):
  """What generators return that are run side by side, each to its next `yield` in turn.

  The compiler keeps near to the order it is given: so products of several chunks come to stand
  together, where those of one chunk would wait for each other.
  """
  results, going = [None] * len(makers), dict(enumerate(makers))
  while going:
    for i, maker in list(going.items()):
      try:
        next(maker)
      except StopIteration as e:
        results[i] = e.value
        del going[i]
  return results


def _together(s: Shape, chunks, prepare, finish, states):
  """The chunks of every head in turn, some of them prepared in step while those before them are finished."""
  steps = [(i, n) for n in chunks for i in range(s.group)]
  count = 2 if s.parts == 1 else max(TOGETHER // s.group, 2)  # float32, and heads that share lanes, take more registers
  batches = [steps[a : a + count] for a in range(0, len(steps), count)]
  waiting = _in_step([prepare(*step) for step in batches[0]])
  for at, batch in enumerate(batches):
    ready = waiting
    if at + 1 < len(batches):
      waiting = _in_step([prepare(*step) for step in batches[at + 1]])
    for (i, n), prepared in zip(batch, ready, strict=True):
      states[i] = finish(i, n, states[i], *prepared)
  return states


def _column(row, width: int):
  """[1, n] -> [n, width] of equal columns."""
  n = row.shape[1]
  return jnp.broadcast_to(jnp.broadcast_to(row, (n, n)).T[:, :1], (n, width))


def _row(column):
  """[n, 1] -> [1, n]."""
  n = column.shape[0]
  return jnp.broadcast_to(column, (n, n)).T[:1]


class _Head(NamedTuple):
  """q and k of a chunk of a head as attention takes them, and the way back."""

  q: jax.Array
  k: jax.Array
  pull: jax.Array  # (dq, dk) -> (gradients of the raw q and k, of theta)


def _head(s: Shape, x_ref, n, i, start, theta, at) -> _Head:
  """theta: float32 [1, d], at: float32 [chunk, d], its tokens' positions; None both without phases."""
  dtype = x_ref.dtype
  activate = lambda x: ACTIVATIONS[s.activation](x)
  raw = [tpu.tokens_of(s, x_ref, n, s.fields * i + part, s.d, start).astype(jnp.float32) for part in (0, 1)]
  (q, pull_q), (k, pull_k) = (jax.vjp(activate, x) for x in raw)
  rounded = [q.astype(dtype), k.astype(dtype)]
  if theta is None:
    return _Head(*rounded, lambda dq, dk: (pull_q(dq)[0], pull_k(dk)[0], None))
  sin, cos = sin_cos(at * theta)
  q, k = (x.astype(jnp.float32) for x in rounded)
  turned = [jnp.concatenate([x * cos, x * sin], axis=1).astype(dtype) for x in (q, k)]

  def pull(dq, dk):
    total, raw = jnp.zeros_like(cos), []
    for x, dx, back in ((q, dq, pull_q), (k, dk, pull_k)):
      dx = dx[:, : s.d], dx[:, s.d :]
      total += x * (cos * dx[1] - sin * dx[0])
      raw += back(cos * dx[0] + sin * dx[1])
    return *raw, jnp.sum(at * total, axis=0, keepdims=True)

  return _Head(*turned, pull)


def _phases_of(s: Shape, theta_ref, positions_ref, n, i, start):
  """(theta of head i, positions of chunk n), as `_head` takes them."""
  if not s.phased:
    return None, None
  at = positions_ref[0, :, n * s.chunk : (n + 1) * s.chunk]
  if s.ragged:
    at = jnp.where(start + iota(at.shape, 1) < s.length, at, 0)
  return theta_ref[0, 0, i : i + 1], _column(at.astype(jnp.float32), s.d)


def _forward_kernel(s: Shape, keep, rate_ref, x_ref, state_ref, *rest):
  rest = list(rest)
  theta_ref, positions_ref = (rest.pop(0), rest.pop(0)) if s.phased else (None, None)
  runs_ref = rest.pop(0) if s.packed else None
  out_ref, squares_ref, final_ref = rest.pop(0), rest.pop(0), rest.pop(0)
  kept_ref = rest.pop(0) if keep else None
  acc_ref, within_ref, enter_ref, leave_ref, run_ref = rest
  j, last = pl.program_id(2), pl.num_programs(2) - 1
  rates = [rate_ref[pl.program_id(1) * s.group + i] for i in range(s.group)]

  @pl.when(j == 0)
  def _():
    acc_ref[...] = state_ref[0]
    tpu.make_powers(s, rates, within_ref, enter_ref, leave_ref)
    run_ref[0] = 0

  if keep:
    kept_ref[0, 0] = acc_ref[...]
  runs, ends = [None] * len(s.chunks), [None] * (len(s.chunks) + 1)
  if s.packed:
    runs, ends = tpu.runs_of(s, runs_ref, j * s.block, run_ref[0])
    run_ref[0] = ends[-1]

  def prepare(i, n):
    start = j * s.block + n * s.chunk
    f = tpu.powers_of(s, i, rates[i], start, runs[n], ends[n], ends[n + 1], within_ref, enter_ref, leave_ref)
    head = _head(s, x_ref, n, i, start, *_phases_of(s, theta_ref, positions_ref, n, i, start))
    v = tpu.tokens_of(s, x_ref, n, s.fields * i + 2, s.d, start)
    yield
    scores = dot(head.q, head.k, (1, 1)) * f.within
    yield
    out = split_dot(s, scores, v, (1, 0))
    leaving = tpu.wide(f.leave, s.d) * v.astype(jnp.float32)
    return f, head.q, out, outer(s, head.k, leaving)

  def finish(i, n, state, f, q, out, more):
    rows = pl.ds(n * s.chunk, s.chunk)
    out += tpu.wide(f.enter, s.d) * wide_dot(s, q, state, (1, 0))
    squares_ref[0, i, :, rows] = _row(jnp.sum(out * out, axis=1, keepdims=True))
    if s.fields == 4:
      out *= x_ref[0, rows, (4 * i + 3) * s.d : (4 * i + 4) * s.d].astype(jnp.float32)
    out_ref[0, rows, i * s.d : (i + 1) * s.d] = out.astype(out_ref.dtype)
    return f.whole * state + more

  for i, state in enumerate(_together(s, s.chunks, prepare, finish, [acc_ref[i] for i in range(s.group)])):
    acc_ref[i] = state

  @pl.when(j == last)
  def _():
    final_ref[0] = acc_ref[...]


def _backward_kernel(s: Shape, blocks, rate_ref, x_ref, dout_ref, dsquares_ref, kept_ref, dfinal_ref, *rest):
  rest = list(rest)
  theta_ref, positions_ref = (rest.pop(0), rest.pop(0)) if s.phased else (None, None)
  runs_ref, ends_ref = (rest.pop(0), rest.pop(0)) if s.packed else (None, None)
  dx_ref, dstate_ref = rest.pop(0), rest.pop(0)
  dtheta_ref = rest.pop(0) if s.phased else None
  acc_ref, within_ref, enter_ref, leave_ref, states_ref = rest
  j, last = pl.program_id(2), pl.num_programs(2) - 1
  rates = [rate_ref[pl.program_id(1) * s.group + i] for i in range(s.group)]

  @pl.when(j == 0)
  def _():
    acc_ref[...] = dfinal_ref[0]
    tpu.make_powers(s, rates, within_ref, enter_ref, leave_ref)
    if s.phased:
      dtheta_ref[...] = jnp.zeros_like(dtheta_ref)

  at = blocks - 1 - j
  runs, ends = [None] * len(s.chunks), [None] * (len(s.chunks) + 1)
  if s.packed:
    runs, ends = tpu.runs_of(s, runs_ref, at * s.block, ends_ref[0, 0, at])

  def powers(i, n, start):
    return tpu.powers_of(s, i, rates[i], start, runs[n], ends[n], ends[n + 1], within_ref, enter_ref, leave_ref)

  def head_of(i, n, start):
    return _head(s, x_ref, n, i, start, *_phases_of(s, theta_ref, positions_ref, n, i, start))

  def adds(i, n):
    """What a chunk adds to the state."""
    start = at * s.block + n * s.chunk
    f, v = powers(i, n, start), tpu.tokens_of(s, x_ref, n, s.fields * i + 2, s.d, start)
    leaving = tpu.wide(f.leave, s.d) * v.astype(jnp.float32)
    k = head_of(i, n, start).k
    yield
    return f.whole, outer(s, k, leaving)

  def enters(i, n, state, whole, more):
    states_ref[i, n] = state
    return whole * state + more

  states = _together(s, s.chunks[:-1], adds, enters, [kept_ref[0, 0, i] for i in range(s.group)])
  for i, state in enumerate(states):
    states_ref[i, len(s.chunks) - 1] = state

  def prepare(i, n):
    """What needs no gradient of a state."""
    start, rows = at * s.block + n * s.chunk, pl.ds(n * s.chunk, s.chunk)
    f, head, state = powers(i, n, start), head_of(i, n, start), states_ref[i, n]
    q, k = head.q, head.k
    v = tpu.tokens_of(s, x_ref, n, s.fields * i + 2, s.d, start)
    yield
    scores = dot(q, k, (1, 1)) * f.within
    yield
    out = split_dot(s, scores, v, (1, 0))
    out += tpu.wide(f.enter, s.d) * wide_dot(s, q, state, (1, 0))
    yield
    dout = tpu.tokens_of(s, dout_ref, n, i, s.d, start).astype(jnp.float32)
    if s.fields == 4:
      dx_ref[0, rows, (4 * i + 3) * s.d : (4 * i + 4) * s.d] = (dout * out).astype(dx_ref.dtype)
      dout *= tpu.tokens_of(s, x_ref, n, 4 * i + 3, s.d, start).astype(jnp.float32)
    dsquares = dsquares_ref[0, i, :, rows]
    if s.ragged:
      dsquares = jnp.where(start + iota(dsquares.shape, 1) < s.length, dsquares, 0.0)
    dout = (dout + 2 * _column(dsquares, s.d) * out).astype(x_ref.dtype)
    yield
    dscores = dot(dout, v, (1, 1)) * f.within
    yield
    dq = split_dot(s, dscores, k, (1, 0))
    dq += tpu.wide(f.enter, s.d_k) * wide_dot(s, dout, state, (1, 1))
    dk, dv = split_dot(s, dscores, q, (0, 0)), split_dot(s, scores, dout, (0, 0))
    entering = tpu.wide(f.enter, s.d) * dout.astype(jnp.float32)
    return f, head, v, dq, dk, dv, outer(s, q, entering)

  def finish(i, n, dstate, f, head, v, dq, dk, dv, more):
    rows = pl.ds(n * s.chunk, s.chunk)
    dk += tpu.wide(f.leave, s.d_k) * wide_dot(s, v, dstate, (1, 1))
    dv += tpu.wide(f.leave, s.d) * wide_dot(s, head.k, dstate, (1, 0))
    dq, dk, dtheta = head.pull(dq, dk)
    for part, dx in enumerate((dq, dk, dv)):
      dx_ref[0, rows, (s.fields * i + part) * s.d : (s.fields * i + part + 1) * s.d] = dx.astype(dx_ref.dtype)
    if s.phased:
      dtheta_ref[0, 0, i : i + 1] += dtheta
    return f.whole * dstate + more

  for i, dstate in enumerate(_together(s, s.chunks[::-1], prepare, finish, [acc_ref[i] for i in range(s.group)])):
    acc_ref[i] = dstate

  @pl.when(j == last)
  def _():
    dstate_ref[0] = acc_ref[...]
