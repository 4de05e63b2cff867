"""Causal linear attention with exponential decay: lightning attention, retention."""

from collections.abc import Callable

import jax
from jax import P
import jax.numpy as jnp
import numpy as np

from research.errors import check
from research.kernels import dispatch
from research.kernels.lightning_attention import context_parallel, pallas_gpu, pallas_tpu, reference, xla
from research.mesh import BATCH

STATE = P(BATCH, "model", None, None)  # [batch, heads, d_k, d_v]

IMPLEMENTATIONS = {
  "pallas_tpu": pallas_tpu.attention,
  "pallas_gpu": pallas_gpu.attention,
  "xla": xla.attention,
  "recurrent": reference.recurrent,
  "reference": reference.attention,
}


def lightning_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  decay: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  initial_state: jax.Array | None = None,
  implementation: str | Callable | None = None,
) -> tuple[jax.Array, jax.Array]:
  """out_t = sum over s <= t of decay^(t-s) (q_t . k_s) v_s; with S_t = decay S_{t-1} + k_t v_t^T, out_t = q_t S_t.

  TransNormerLLM (arXiv 2307.14995, equation 10) with Lightning Attention-2 (2401.04658).
  No softmax and no scale.

  Args:
    q, k: [batch, length, heads, d_k].
    v: [batch, length, heads, d_v].
    decay: [heads], each in (0, 1]. A constant: its gradient is zero.
    segment_ids: int32 [batch, length], or None for one segment a row. A token sees those before it up to
      the last change of the id; the tokens of one document stand together, so an id does not come back.
    initial_state: float32 [batch, heads, d_k, d_v] of what came before, for a row's first segment; None: zeros.
    implementation: "pallas_tpu" (fused, for TPUs), "pallas_gpu" (fused, for NVIDIA GPUs: bfloat16 or float32, head
      dims up to 256), "xla" (chunked, anywhere), "recurrent" (a token at a time), "reference" (dense), None
      for the first that supports the call, or a function with the arguments of `xla.attention`.

  Returns:
    (out [batch, length, heads, d_v] in q's dtype, the state after the last token, float32), accumulated in float32
    (float64 for float64 operands, state included). On a mesh all are cut by batch and heads, and no device talks to
    another. If q stands cut along its length, so do the others, and devices exchange states: see context_parallel.py.

  Raises:
    UserError: shapes or dtypes that do not fit together or on the mesh, a decay outside (0, 1] or ids that come
      back (where their values are known), an unknown implementation or a named one that cannot run this call.
  """
  check_call(q, k, v, decay, segment_ids, initial_state)
  where = context_parallel.layout(q)
  if not callable(implementation):
    obstacles = {"pallas_tpu": pallas_tpu.obstacle(q, v), "pallas_gpu": pallas_gpu.obstacle(q, v)}
    chosen = dispatch.choose(implementation, obstacles | dict.fromkeys(("xla", "recurrent", "reference")))
    implementation = IMPLEMENTATIONS[chosen]
  q, k, v = (dispatch.place(x, where.qkv) for x in (q, k, v))
  decay = dispatch.place(jnp.asarray(decay), where.decay)
  segment_ids, initial_state = dispatch.place(segment_ids, where.tokens), dispatch.place(initial_state, where.state)
  operands = q, k, v, decay, segment_ids, initial_state
  if context_parallel.parts(where.length) > 1:
    return context_parallel.attention(implementation, where, *operands)
  specs = (where.qkv, where.qkv, where.qkv, where.decay, where.tokens, where.state)
  return dispatch.per_shard(implementation, specs, (where.qkv, where.state))(*operands)


def check_call(q, k, v, decay, segment_ids, initial_state):
  check(q.ndim == 4, "q", q.shape, "use [batch, length, heads, d_k]")
  check(k.shape == q.shape, "k", k.shape, f"q has shape {q.shape}; give q and k one shape")
  check(v.ndim == 4 and v.shape[:3] == q.shape[:3], "v", v.shape, f"use {q.shape[:3]} and d_v")
  check(q.shape[1] > 0, "q", q.shape, "needs at least one token")
  check(q.dtype == k.dtype == v.dtype, "k", f"{k.dtype} and v={v.dtype}", f"q is {q.dtype}; give q, k and v one dtype")
  check(jnp.issubdtype(q.dtype, jnp.floating), "q", q.dtype, "use a floating dtype")
  batch, length, heads, d_k = q.shape
  check(jnp.shape(decay) == (heads,), "decay", jnp.shape(decay), f"use [heads] = ({heads},)")
  known = _values(decay)
  if known is not None:
    outside = known[~((known > 0) & (known <= 1))]
    check(outside.size == 0, "decay", outside[:1], "use numbers in (0, 1]")
  if segment_ids is not None:
    check(segment_ids.shape == (batch, length), "segment_ids", segment_ids.shape, f"use {(batch, length)}")
    check(jnp.issubdtype(segment_ids.dtype, jnp.integer), "segment_ids", segment_ids.dtype, "use int32")
    ids = _values(segment_ids)
    if ids is not None:
      runs = 1 + (ids[:, 1:] != ids[:, :-1]).sum(axis=1)
      back = [row for row in range(batch) if runs[row] > len(np.unique(ids[row]))]
      check(
        not back, "segment_ids", f"row {back[0] if back else 0}", "an id comes back; put a document's tokens together"
      )
  if initial_state is not None:
    shape, dtype = (batch, heads, d_k, v.shape[-1]), jnp.promote_types(q.dtype, jnp.float32)
    check(initial_state.shape == shape, "initial_state", initial_state.shape, f"use {shape}")
    check(
      initial_state.dtype == dtype, "initial_state", initial_state.dtype, f"use {dtype}; it is not rounded to q's dtype"
    )


def _values(x) -> np.ndarray | None:
  """The numbers of an array, if they are known while tracing."""
  return None if isinstance(x, jax.core.Tracer) else np.asarray(x)
