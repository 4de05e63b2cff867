"""Linear attention with decay over rows cut along their length: devices exchange states, and no token.

All that a shard has to know of the tokens before it is a state of d_k x d_v. With n tokens a
shard, and S_j what those of shard j alone leave behind,

  the state before shard i = sum over j < i of decay^(n (i-1-j)) S_j

over those j whose last document is the one that shard i begins with. Gradients come back by
the same sum from the other end. So a pass over k and v makes S_j, one all-gather brings every
S_j to every device (LASP-2: Sun et al., 2025, arXiv 2502.07563), and any implementation does
the rest from the state it would have found there.

Reading k and v twice moves 1.5 times the bytes of one kernel. To start from zeros and add
decay^(t+1) q_t S to the output afterwards would move 1.75 times, and round the output twice. A
scan in log2 steps would send fewer states, but over a ring's links as many, one after another.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax import P
import jax.numpy as jnp

from research.errors import check
from research.kernels import dispatch
from research.kernels.lightning_attention.reference import run_numbers
from research.mesh import BATCH


class Layout(NamedTuple):
  """The mesh axes that the arrays of a call are cut along."""

  batch: tuple[str, ...]
  length: tuple[str, ...]
  heads: tuple[str, ...]

  @property
  def qkv(self) -> P:
    return P(self.batch or None, self.length or None, self.heads or None, None)

  @property
  def tokens(self) -> P:
    return P(self.batch or None, self.length or None)

  @property
  def state(self) -> P:
    return P(self.batch or None, self.heads or None, None, None)

  @property
  def decay(self) -> P:
    return P(self.heads or None)


def layout(q) -> Layout:
  """Rows are cut along their length if q stands so; the mesh axes that are left cut batch and heads.

  Raises UserError if those do not divide them. (jax lets no array stand cut into unequal parts.)
  """
  length = jax.typeof(q).sharding.spec[1] if dispatch.on_mesh() else None
  length = (length,) if isinstance(length, str) else length or ()
  left = lambda axes: tuple(axis for axis in axes if axis not in length)
  found = Layout(left(BATCH), length, left(("model",)))
  for name, axes, size in (("batch", found.batch, q.shape[0]), ("heads", found.heads, q.shape[2])):
    n = parts(axes)
    check(size % n == 0, name, size, f"mesh.{' x mesh.'.join(axes)}={n} cuts them; use a multiple of it")
  return found


def parts(axes: tuple[str, ...]) -> int:
  """Into how many parts mesh axes cut an array."""
  return math.prod(map(dispatch.axis_size, axes))


def attention(implementation, where: Layout, q_bthk, k_bthk, v_bthv, decay_h, segment_ids=None, state_bhkv=None):
  """As `api.lightning_attention`; operands stand as `where` says, and `implementation` runs each device's part."""
  (batch, _, heads, d_k), d_v = q_bthk.shape, v_bthv.shape[-1]
  dtype = jnp.promote_types(q_bthk.dtype, jnp.float32)
  if state_bhkv is None:
    state_bhkv = dispatch.place(jnp.zeros((batch, heads, d_k, d_v), dtype), where.state)
  return _attention(implementation, where, q_bthk, k_bthk, v_bthv, decay_h.astype(dtype), segment_ids, state_bhkv)


class _Ends(NamedTuple):
  """int32 [shards + 1, batch]: the numbers of the runs at the shards' ends, counted along the whole row.

  State j (0: the initial one; else what shard j - 1 leaves) reaches shard i >= j (the last: the
  row's end) if the run that it is of is the one that shard i begins with.
  """

  of_state: jax.Array
  at_shard: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(implementation, where, q, k, v, decay, segment_ids, state):
  return _forward(implementation, where, q, k, v, decay, segment_ids, state)[0]


def _forward(implementation, where, q, k, v, decay, segment_ids, state):
  def local(q, k, v, decay, segment_ids, state):
    length = k.shape[1]
    runs = run_numbers(segment_ids, k.shape[:2])
    ends = _ends(where, segment_ids, runs)
    to_end = jnp.where(runs == runs[:, -1:], length - 1 - jnp.arange(length), -1)
    states = jax.lax.all_gather(_state(k, v, decay, to_end), where.length)
    states = jnp.concatenate([state[None], states])
    here = jnp.stack([jax.lax.axis_index(where.length), len(states) - 1])
    reach = _reach(decay, length, ends)[here]
    before, final = jnp.einsum("ijbh,jbhkv->ibhkv", reach, states, precision="highest")
    out, _ = implementation(q, k, v, decay, segment_ids, before)
    return out, final, before[None], ends

  specs = where.qkv, where.qkv, where.qkv, where.decay, where.tokens, where.state
  befores, ends = P(where.length, *where.state), _Ends(*[P(None, *where.tokens[:1])] * 2)
  call = dispatch.per_shard(local, specs, (where.qkv, where.state, befores, ends))
  out, final, before, ends = call(q, k, v, decay, segment_ids, state)
  return (out, final), (q, k, v, decay, segment_ids, before, ends)


def _backward(implementation, where, residuals, cotangents):
  def local(q, k, v, decay, segment_ids, before, ends, dout, dfinal):
    length = k.shape[1]
    runs = run_numbers(segment_ids, k.shape[:2])
    from_start = jnp.where(runs == 0, 1 + jnp.arange(length), -1)
    dstates = jax.lax.all_gather(_state(q, dout, decay, from_start), where.length)
    dstates = jnp.concatenate([dstates, dfinal[None]])
    here = jnp.stack([0, 1 + jax.lax.axis_index(where.length)])
    reach = _reach(decay, length, ends)[:, here]
    dstate, dafter = jnp.einsum("ijbh,ibhkv->jbhkv", reach, dstates, precision="highest")
    _, vjp = jax.vjp(lambda q, k, v: implementation(q, k, v, decay, segment_ids, before[0]), q, k, v)
    return *vjp((dout, dafter)), dstate

  specs = where.qkv, where.qkv, where.qkv, where.decay, where.tokens
  befores, ends = P(where.length, *where.state), _Ends(*[P(None, *where.tokens[:1])] * 2)
  specs = *specs, befores, ends, where.qkv, where.state
  call = dispatch.per_shard(local, specs, (where.qkv, where.qkv, where.qkv, where.state))
  dout, dfinal = (dispatch.place(x, spec) for x, spec in zip(cotangents, (where.qkv, where.state), strict=True))
  dq, dk, dv, dstate = call(*residuals, dout, dfinal)
  return dq, dk, dv, jnp.zeros_like(residuals[3]), None, dstate  # the decay is a constant of the model


_attention.defvjp(_forward, _backward)


def _power(decay, n):
  """decay^n [*n.shape, heads] for int32 n; 0 where n is negative: masked before the exponential."""
  rate, n = jnp.log(decay), n[..., None]
  return jnp.where(n < 0, 0, jnp.exp(rate * jnp.maximum(n, 0).astype(rate.dtype)))


def _state(k, v, decay, distance):
  """sum over tokens of decay^distance k v^T, [batch, heads, d_k, d_v]; none of tokens whose distance is negative."""
  scaled = _power(decay, distance)[..., None] * v
  # beside bfloat16, 16 bits of the other factor are as exact as the kernels
  precision = "high" if k.dtype == jnp.bfloat16 else "highest"
  return jnp.einsum("bshk,bshv->bhkv", k.astype(scaled.dtype), scaled, precision=precision)


def _ends(where, segment_ids, runs) -> _Ends:
  if segment_ids is None:
    zeros = jnp.zeros((1 + jax.lax.axis_size(where.length), runs.shape[0]), jnp.int32)
    return _Ends(zeros, zeros)
  mine = jnp.stack([segment_ids[:, 0], segment_ids[:, -1], runs[:, -1]])
  first, last, changes = jax.lax.all_gather(mine, where.length, axis=1)
  joints = jnp.pad((first[1:] != last[:-1]).astype(jnp.int32), ((1, 0), (0, 0)))
  ends = jnp.cumsum(joints + changes, axis=0)
  return _Ends(jnp.pad(ends, ((1, 0), (0, 0))), jnp.concatenate([ends - changes, ends[-1:]]))


def _reach(decay, length, ends: _Ends):
  """[i, j, batch, heads]: what of state j arrives at shard i."""
  n = jnp.arange(len(ends.of_state))
  apart = jnp.where(ends.at_shard[:, None] == ends.of_state, length * (n[:, None] - n)[..., None], -1)
  return _power(decay, apart)
