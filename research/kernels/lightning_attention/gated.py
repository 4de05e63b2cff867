"""Gated linear attention as a layer has it: from its projection's output to what its next projection takes."""

from collections.abc import Callable
import functools

import jax
from jax import P
import jax.numpy as jnp

from research.errors import check
from research.kernels import dispatch
from research.kernels.attention.api import HEADS
from research.kernels.lightning_attention import context_parallel, pallas_tpu_gated
from research.kernels.lightning_attention.api import STATE, check_call, lightning_attention
from research.kernels.lightning_attention.features import ACTIVATIONS, activate, phases
from research.mesh import BATCH, TOKENS

FUSED = P(BATCH, None, "model", None, None)  # [batch, length, heads, 4, d]


def gated_lightning_attention(
  qkvu: jax.Array,
  decay: jax.Array,
  *,
  activation: str = "silu",
  theta: jax.Array | None = None,
  positions: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  initial_state: jax.Array | None = None,
  implementation: str | Callable | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """o * u with o = lightning_attention(phases(act(q)), phases(act(k)), v), and what a norm of o needs to know.

  SRMSNorm multiplies all heads of a token by one positive number, before or after the gate and the
  projection that follow. So it is left to the caller, who has that number from the sums of squares: for
  `n` numbers a token, rsqrt(squares.sum(-1) / n + eps). TransNormerLLM (arXiv 2307.14995), equations 9 to 14.

  Args:
    qkvu: [batch, length, heads, 4, d], as a projection makes it: q, k, v and the gate u of a head side by side;
      [batch, length, heads, 3, d] without the gate.
    decay: [heads], each in (0, 1]. A constant: its gradient is zero.
    activation: of queries and keys, one of `features.ACTIVATIONS`; in float32, rounded to qkvu's dtype.
    theta: [heads, d], radians a position of `features.phases`, after the activation; None: no phases.
    positions: int32 [batch, length], for theta.
    segment_ids, implementation: as for `lightning_attention`. One kernel does it all on TPUs; elsewhere, for another
      implementation by name or function, for shapes it does not take and for a qkvu cut along its length, the parts are
      computed one after the other. Its phases are as exact as their float32 angles up to 10^5 radians.
    initial_state: float32 [batch, heads, d, or 2 d with theta, d].

  Returns:
    (o * u [batch, length, heads, d] in qkvu's dtype; the sum of the squares of o [batch, length, heads],
    float32; the state after the last token, float32). float64 for float64 operands.

  Raises:
    UserError: as `lightning_attention`; an unknown activation, theta without positions.
  """
  _check(qkvu, decay, activation, theta, positions, segment_ids, initial_state)
  theta = dispatch.place(theta, P("model", None))
  cut = context_parallel.parts(context_parallel.layout(qkvu).length) > 1
  if implementation not in (None, "pallas_tpu") or cut or pallas_tpu_gated.obstacle(qkvu, theta) is not None:
    return _composed(qkvu, decay, activation, theta, positions, segment_ids, initial_state, implementation)
  qkvu = dispatch.place(qkvu, FUSED)
  segment_ids, positions = dispatch.place(segment_ids, TOKENS), dispatch.place(positions, TOKENS)
  decay, initial_state = dispatch.place(jnp.asarray(decay), P("model")), dispatch.place(initial_state, STATE)
  if theta is not None:
    # a row each: what is differentiated must be cut along every axis of the mesh
    theta = jnp.broadcast_to(theta, (qkvu.shape[0], *theta.shape), out_sharding=_on_mesh(P(BATCH, "model", None)))
  specs = (FUSED, P("model"), P(BATCH, "model", None), TOKENS, TOKENS, STATE)
  call = functools.partial(pallas_tpu_gated.attention, activation=activation)
  local = dispatch.per_shard(call, specs, (HEADS, P(BATCH, None, "model"), STATE))
  return local(qkvu, decay, theta, positions, segment_ids, initial_state)


def _composed(qkvu, decay, activation, theta, positions, segment_ids, initial_state, implementation):
  where = context_parallel.layout(qkvu)
  # split, not indexing: its transpose is one concatenation instead of padded sums
  q, k, v, *u = (dispatch.place(jnp.squeeze(z, 3), where.qkv) for z in jnp.split(qkvu, qkvu.shape[3], axis=3))
  q, k = (activate(activation, z) for z in (q, k))
  if theta is not None:
    q, k = (phases(z, positions, theta) for z in (q, k))
  out, final = lightning_attention(
    q, k, v, decay, segment_ids=segment_ids, initial_state=initial_state, implementation=implementation
  )
  squares = jnp.sum(jnp.square(out.astype(final.dtype)), axis=-1)
  return out * u[0] if u else out, squares, final


def _wide(qkvu, theta) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
  """What q, or k, and v are."""
  *shape, _, d = qkvu.shape
  of = lambda d: jax.ShapeDtypeStruct((*shape, d), qkvu.dtype)
  return of(d if theta is None else 2 * d), of(d)


def _on_mesh(spec: P) -> P | None:
  return spec if dispatch.on_mesh() else None


def _check(qkvu, decay, activation, theta, positions, segment_ids, initial_state):
  shape = "[batch, length, heads, 4 (q, k, v, u) or 3, d]"
  check(qkvu.ndim == 5 and qkvu.shape[3] in (3, 4), "qkvu", qkvu.shape, f"use {shape}")
  check(activation in ACTIVATIONS, "activation", activation, f"use one of {', '.join(ACTIVATIONS)}")
  batch, length, heads, _, d = qkvu.shape
  if theta is not None:
    check(theta.shape == (heads, d), "theta", theta.shape, f"use [heads, d] = ({heads}, {d})")
    known = positions is not None and positions.shape == (batch, length) and positions.dtype == jnp.int32
    check(known, "positions", getattr(positions, "shape", None), f"theta needs them; use int32 {(batch, length)}")
  q, v = _wide(qkvu, theta)
  check_call(q, q, v, decay, segment_ids, initial_state)
