"""Causal attention for any platform, in plain XLA; tuned on CPUs.

Three things make it faster than masking a dense softmax: blocks of queries that
only meet the keys before them, the softmax's division moved from the scores to
the outputs, and rows of the batch taken a few at a time so that their scores
stay in cache.
"""

import functools
import math

import jax
import jax.numpy as jnp

from research.kernels import dispatch

MIN_BLOCK = 64  # queries in a block: below it the matrix products get too thin
MAX_BLOCKS = 8  # blocks are unrolled, and 8 of them already skip 7/16 of the scores
KEPT_BYTES = 64 * 2**20  # exponentials kept for the backward pass; it recomputes them where they are more
SCORES_BYTES_CPU = 2**20  # of one block of scores: what a cache holds
SCORES_BYTES = 256 * 2**20  # the same elsewhere: only a bound on memory


def attention(q_bthd, k_bskd, v_bskd, segment_ids=None, *, scale):
  """As `api.attention`."""
  return _attention(q_bthd, k_bskd, v_bskd, segment_ids, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, segment_ids, scale):
  return _map_rows(lambda *rows: _forward(*rows, scale)[0], q, k, v, segment_ids)


def _attention_fwd(q, k, v, segment_ids, scale):
  batch, length, heads, _ = q.shape
  keep = q.dtype.itemsize * batch * heads * sum((e - s) * e for s, e in _blocks(length)) <= KEPT_BYTES

  def forward(*rows):
    out, stats, exps = _forward(*rows, scale)
    return out, stats, exps if keep else None

  out, stats, exps = _map_rows(forward, q, k, v, segment_ids)
  return out, (q, k, v, segment_ids, out, stats, exps)


def _attention_bwd(scale, residuals, dout):
  return *_map_rows(lambda *rows: _backward(*rows, scale), *residuals, dout), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(q_bthd, k_bskd, v_bskd, segment_ids, scale):
  """The output; each query's largest score and sum of exponentials; the exponentials, a block a time."""
  q, k, v = _queries(q_bthd, k_bskd), k_bskd.swapaxes(1, 2), v_bskd.swapaxes(1, 2)
  outs, peaks, sums, exps = [], [], [], []
  for start, end in _blocks(q.shape[3]):
    scores = _scores(q, k, segment_ids, scale, start, end)
    peak = scores.max(axis=-1, keepdims=True)
    exp = jnp.exp(scores - peak)
    total = exp.sum(axis=-1, keepdims=True)
    exp = exp.astype(v.dtype)
    outs.append(_dot("bkgts,bksd->bkgtd", exp, v[:, :, :end]) / total)
    peaks.append(peak)
    sums.append(total)
    exps.append(exp)
  out, peak, total = (jnp.concatenate(x, axis=3) for x in (outs, peaks, sums))
  return _tokens_first(out.astype(q.dtype)), (peak, total), exps


def _backward(q_bthd, k_bskd, v_bskd, segment_ids, out, stats, exps, dout, scale):
  """FlashAttention's backward pass (https://arxiv.org/abs/2205.14135, appendix B.4)."""
  q, k, v = _queries(q_bthd, k_bskd), k_bskd.swapaxes(1, 2), v_bskd.swapaxes(1, 2)
  peak, total = stats
  dout = _queries(dout, k_bskd)
  delta = (dout.astype(total.dtype) * _queries(out, k_bskd)).sum(axis=-1, keepdims=True)
  inverse = 1 / total
  dout_scaled = (dout * inverse).astype(dout.dtype)
  dqs, dk, dv = [], None, None
  # Last block first: it meets all keys, so its dk and dv have the full length.
  for i, (start, end) in reversed(list(enumerate(_blocks(q.shape[3])))):
    now = (slice(None),) * 3 + (slice(start, end),)
    if exps is None:
      exp = jnp.exp(_scores(q, k, segment_ids, scale, start, end) - peak[now]).astype(v.dtype)
    else:
      exp = exps[i]
    dprobs = _dot("bkgtd,bksd->bkgts", dout[now], v[:, :, :end])
    dscores = (exp * ((dprobs - delta[now]) * inverse[now])).astype(q.dtype)
    dqs.append(_dot("bkgts,bksd->bkgtd", dscores, k[:, :, :end]))
    dk = _add_head(dk, _dot("bkgts,bkgtd->bksd", dscores, q[now]))
    dv = _add_head(dv, _dot("bkgts,bkgtd->bksd", exp, dout_scaled[now]))
  dq = scale * jnp.concatenate(dqs[::-1], axis=3)
  dk = scale * dk
  return _tokens_first(dq.astype(q.dtype)), dk.swapaxes(1, 2).astype(k.dtype), dv.swapaxes(1, 2).astype(v.dtype)


def _blocks(length: int) -> list[tuple[int, int]]:
  size = max(MIN_BLOCK, MIN_BLOCK * math.ceil(length / MAX_BLOCKS / MIN_BLOCK))
  return [(start, min(start + size, length)) for start in range(0, length, size)]


def _scores(q_bkgtd, k_bksd, segment_ids, scale, start, end):
  """Of the queries start..end against the keys before `end`, the only ones they can see."""
  visible = jnp.arange(start, end)[:, None] >= jnp.arange(end)
  if segment_ids is not None:
    same = segment_ids[:, start:end, None] == segment_ids[:, None, :end]
    visible = visible & same[:, None, None]
  scores = scale * _dot("bkgtd,bksd->bkgts", q_bkgtd[:, :, :, start:end], k_bksd[:, :, :end])
  return jnp.where(visible, scores, -jnp.inf)  # a query sees itself: no row is empty


def _dot(subscripts, a, b):
  return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _queries(x_bthd, k_bskd):
  """[batch, length, heads, head_dim] -> [batch, kv_heads, group, length, head_dim]."""
  batch, length, heads, head_dim = x_bthd.shape
  kv_heads = k_bskd.shape[2]
  return x_bthd.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)


def _tokens_first(x_bkgtd):
  batch, kv_heads, group, length, head_dim = x_bkgtd.shape
  return x_bkgtd.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, head_dim)


def _add_head(total, part):
  """`total` with `part` added to its first positions. Not `.at[].add`: a CPU would scatter."""
  if total is None:
    return part
  end = part.shape[2]
  return jnp.concatenate([total[:, :, :end] + part, total[:, :, end:]], axis=2)


def _map_rows(f, *args):
  """`f`, which treats every row of the batch alike, on as many rows at once as SCORES_BYTES allows."""
  batch, length, heads = args[0].shape[:3]
  start, end = _blocks(length)[-1]
  limit = SCORES_BYTES_CPU if dispatch.platform() == "cpu" else SCORES_BYTES
  rows = max(
    r for r in range(1, batch + 1) if batch % r == 0 and (r == 1 or r * heads * (end - start) * end * 4 <= limit)
  )
  if rows == batch:
    return f(*args)
  split = jax.tree.map(lambda x: x.reshape(batch // rows, rows, *x.shape[1:]), args)
  return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), jax.lax.map(lambda group: f(*group), split))
