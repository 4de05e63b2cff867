"""Cross-entropy a chunk of tokens at a time, with its gradients, on one device's shards.

The collectives are here too: over `model_axis`, which cuts the vocabulary, and over
`batch_axes`. Only the softmax's denominators cross devices inside the loop (a few
numbers a token, and the gradients cannot be formed without them); losses and
gradients cross once, after it.
"""

import jax
import jax.numpy as jnp

from research.kernels import dispatch

MIN_CHUNK = 128  # tokens: below it the matrix products get too thin
# float32 logits of one chunk: on a CPU what a cache holds. An accelerator reads and
# writes all of dw once a chunk, so its chunks have to be longer for the products, not
# that traffic, to take the time.
LOGITS_BYTES_CPU = 8 * 2**20
LOGITS_BYTES = 128 * 2**20


def nats(x, w, targets, weights, bias=None, *, model_axis=None, chunk=None):
  """-log softmax(x @ w + bias)[targets], float32 [batch, length]; where the weight is 0 it is some finite number.

  x [batch, length, width], w [width, vocab / model], bias [vocab / model], targets and weights [batch, length].
  """

  def body(_, tokens):
    x, targets, _ = tokens
    logits = _logits(x, w, bias)
    peak = logits.max(axis=-1)
    total = jnp.exp(logits - peak[:, None]).sum(axis=-1)
    return None, (peak, total, _of_target(logits, _is_target(targets, logits, model_axis)))

  _, stats = jax.lax.scan(body, None, _chunks(x, w, targets, weights, chunk))
  logsumexp, of_target = _combine(*stats, model_axis)
  return (logsumexp - of_target).reshape(-1)[: targets.size].reshape(targets.shape)


def value(x, w, targets, weights, *, model_axis=None, batch_axes=(), chunk=None):
  """The loss alone."""
  return _psum((weights * nats(x, w, targets, weights, model_axis=model_axis, chunk=chunk)).sum(), batch_axes)


def value_and_grads(x, w, targets, weights, bias=None, *, model_axis=None, batch_axes=(), chunk=None):
  """(loss, dx, dw, dbias), the gradients in float32; dbias is None without a bias."""

  def body(sums, tokens):
    x, targets, weights = tokens
    logits = _logits(x, w, bias)
    is_target = _is_target(targets, logits, model_axis)
    peak = logits.max(axis=-1)
    total = jnp.exp(logits - peak[:, None]).sum(axis=-1)
    logsumexp, of_target = _combine(peak, total, _of_target(logits, is_target), model_axis)
    exact = weights[:, None] * (jnp.exp(logits - logsumexp[:, None]) - is_target)
    dlogits = exact.astype(x.dtype)
    dx = jnp.einsum("nv,dv->nd", dlogits, w, preferred_element_type=jnp.float32)
    dw = sums[0] + jnp.einsum("nd,nv->dv", x, dlogits, preferred_element_type=jnp.float32)
    dbias = None if bias is None else sums[1] + exact.sum(axis=0)
    return (dw, dbias), (dx, (weights * (logsumexp - of_target)).sum())

  chunks = _chunks(x, w, targets, weights, chunk)
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (w, bias))
  sums, (dx, losses) = jax.lax.scan(body, zeros, chunks)
  dx = dx.reshape(-1, x.shape[2])[: targets.size].reshape(x.shape)
  if model_axis:
    dx = jax.lax.psum(dx, model_axis)
  dw, dbias = jax.tree.map(lambda a: _psum(a, batch_axes), sums)
  return _psum(losses.sum(), batch_axes), dx, dw, dbias


def chunk_size(tokens: int, vocab: int, limit: int) -> int:
  """Tokens a chunk: their float32 logits take `limit` bytes at most, and all chunks are about full."""
  most = max(limit // (4 * vocab), MIN_CHUNK)
  count = -(-tokens // most)
  return min(tokens, -(-tokens // count // 8) * 8)


def _chunks(x, w, targets, weights, chunk):
  """x, targets and weights as [chunks, chunk, ...], filled up with positions of weight 0."""
  tokens = targets.size
  if chunk is None:
    limit = LOGITS_BYTES_CPU if dispatch.platform() == "cpu" else LOGITS_BYTES
    chunk = chunk_size(tokens, w.shape[1], limit)
  # Weight 0 alone would not do: 0 * NaN is NaN.
  x = jnp.where(weights[..., None] == 0, 0, x)

  def split(array):
    flat = array.reshape(tokens, *array.shape[2:])
    flat = jnp.pad(flat, [(0, -tokens % chunk)] + [(0, 0)] * (flat.ndim - 1))
    return flat.reshape(-1, chunk, *flat.shape[1:])

  return split(x), split(targets), split(weights)


def _logits(x, w, bias):
  logits = jnp.einsum("nd,dv->nv", x, w, preferred_element_type=jnp.float32)
  return logits if bias is None else logits + bias


def _is_target(targets, logits, model_axis):
  """[tokens, vocab / model]: where this device's logits are those of the targets."""
  vocab = logits.shape[1]
  offset = jax.lax.axis_index(model_axis) * vocab if model_axis else 0
  return jnp.arange(vocab) == (targets - offset)[:, None]


def _of_target(logits, is_target):
  return jnp.where(is_target, logits, 0).sum(axis=-1)


def _combine(peak, total, of_target, model_axis):
  """(logsumexp, target logit) over the whole vocabulary, from each shard's largest logit, sum and target logit."""
  if model_axis:
    peaks, totals, of_targets = jax.lax.all_gather(jnp.stack([peak, total, of_target]), model_axis, axis=1)
    peak = peaks.max(axis=0)
    total = (totals * jnp.exp(peaks - peak)).sum(axis=0)
    of_target = of_targets.sum(axis=0)
  return peak + jnp.log(total), of_target


def _psum(x, axes):
  return jax.lax.psum(x, axes) if axes else x
