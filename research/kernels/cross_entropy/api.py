"""Next-token cross-entropy without the logits of the whole batch."""

import functools

import jax
from jax import P
import jax.numpy as jnp

from research.errors import check
from research.kernels import dispatch
from research.kernels.cross_entropy import reference, xla
from research.mesh import BATCH, HIDDEN, TOKENS

HEAD = P(None, "model")  # [width, vocab], gathered along `data`
BIAS = P("model")  # [vocab]


def cross_entropy(
  x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array, *, implementation: str | None = None
) -> jax.Array:
  """The sum over positions of weights * -log softmax(x @ w)[targets], in nats.

  Args:
    x: [batch, length, width], float32 or bfloat16.
    w: [width, vocab], of x's dtype.
    targets: int32 [batch, length], in 0..vocab-1 wherever the weight is not 0.
    weights: float32 [batch, length]. A position of weight 0 takes no part at all: it
      adds exactly 0 to the value and to the gradients, whatever x holds there, NaN
      included. Weights are data: differentiating by them raises UserError.
    implementation: "xla" (a chunk of tokens at a time), "reference" (all logits at once),
      or None for "xla".

  Returns:
    A float32 scalar (float64 from the reference on float64 operands). Products are
    accumulated in float32. On a mesh x is cut by batch and w by vocabulary, over `model`.

  Raises:
    UserError: shapes that do not fit together or on the mesh, or an unknown implementation.
  """
  _check_shapes(x, w, targets, weights)
  chosen = dispatch.choose(implementation, {"xla": None, "reference": None})
  x, w = dispatch.place(x, HIDDEN), dispatch.place(w, HEAD)
  targets, weights = dispatch.place(targets, TOKENS), dispatch.place(weights, TOKENS)
  return (_chunked if chosen == "xla" else reference.cross_entropy)(x, w, targets, weights)


def row_cross_entropy(
  x: jax.Array,
  w: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  bias: jax.Array | None = None,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """As `cross_entropy` of x @ w + bias, but for each row a sum of its own: float32 [batch].

  bias: float32 [vocab]. The gradients make the logits again, chunk by chunk: how much a row counts is known only
  after its value.
  """
  _check_shapes(x, w, targets, weights)
  check(bias is None or bias.shape == w.shape[1:], "bias", getattr(bias, "shape", None), f"use [vocab] = {w.shape[1:]}")
  chosen = dispatch.choose(implementation, {"xla": None, "reference": None})
  x, w, bias = dispatch.place(x, HIDDEN), dispatch.place(w, HEAD), dispatch.place(bias, BIAS)
  targets, weights = dispatch.place(targets, TOKENS), dispatch.place(weights, TOKENS)
  return (_rows if chosen == "xla" else reference.row_cross_entropy)(x, w, targets, weights, bias)


# The custom_vjp stands outside of the shard_map, so that autodiff never transposes a
# collective. The cotangent of a scalar only scales: the gradients are taken along with
# the value, while the logits are there, and no logits are computed twice.
@jax.custom_vjp
def _chunked(x, w, targets, weights):
  run = functools.partial(xla.value, model_axis=_model_axis(), batch_axes=_batch_axes())
  return dispatch.per_shard(run, (HIDDEN, HEAD, TOKENS, TOKENS), P())(x, w, targets, weights)


def _chunked_fwd(x, w, targets, weights):
  _refuse_weights(weights)
  run = functools.partial(xla.value_and_grads, model_axis=_model_axis(), batch_axes=_batch_axes())
  loss, dx, dw, _ = dispatch.per_shard(run, (HIDDEN, HEAD, TOKENS, TOKENS), (P(), HIDDEN, HEAD, None))(
    x.value, w.value, targets.value, weights.value
  )
  # Empty arrays carry the dtypes: the gradients stay float32 and are rounded once, after scaling.
  return loss, (dx, dw, jnp.zeros(0, x.value.dtype), jnp.zeros(0, w.value.dtype))


def _chunked_bwd(residuals, dloss):
  dx, dw, x, w = residuals
  return (dloss * dx).astype(x.dtype), (dloss * dw).astype(w.dtype), None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd, symbolic_zeros=True)


@jax.custom_vjp
def _rows(x, w, targets, weights, bias):
  nats = functools.partial(xla.nats, model_axis=_model_axis())  # of the mesh: inside of shard_map there is none

  def run(*operands):
    return (operands[3] * nats(*operands)).sum(axis=1)

  return dispatch.per_shard(run, (HIDDEN, HEAD, TOKENS, TOKENS, BIAS), P(BATCH))(x, w, targets, weights, bias)


def _rows_fwd(x, w, targets, weights, bias):
  operands = [a if a is None else a.value for a in (x, w, targets, weights, bias)]
  _refuse_weights(weights)
  return _rows(*operands), operands


def _rows_bwd(operands, drows):
  x, w, targets, weights, bias = operands
  run = functools.partial(xla.value_and_grads, model_axis=_model_axis(), batch_axes=_batch_axes())
  scaled = weights * dispatch.place(drows, P(BATCH))[:, None]
  _, dx, dw, dbias = dispatch.per_shard(run, (HIDDEN, HEAD, TOKENS, TOKENS, BIAS), (P(), HIDDEN, HEAD, BIAS))(
    x, w, targets, scaled, bias
  )
  return dx.astype(x.dtype), dw.astype(w.dtype), None, None, dbias if bias is None else dbias.astype(bias.dtype)


_rows.defvjp(_rows_fwd, _rows_bwd, symbolic_zeros=True)


def _refuse_weights(weights):
  check(
    not weights.perturbed, "weights", "differentiated", "stop_gradient them; the loss is not differentiable by them"
  )


def _model_axis() -> str | None:
  return "model" if dispatch.axis_size("model") > 1 else None


def _batch_axes() -> tuple[str, ...]:
  return tuple(axis for axis in BATCH if dispatch.axis_size(axis) > 1)


def _check_shapes(x, w, targets, weights):
  fits = x.ndim == 3 and w.ndim == 2 and x.shape[2] == w.shape[0]
  check(fits, "w", w.shape, f"x has shape {x.shape}; use [width, vocab] with the same width")
  check(x.dtype == w.dtype, "w", w.dtype, f"x is {x.dtype}; give x and w one dtype")
  for name, array in (("targets", targets), ("weights", weights)):
    check(array.shape == x.shape[:2], name, array.shape, f"use [batch, length] = {x.shape[:2]}")
  model = dispatch.axis_size("model")
  check(w.shape[1] % model == 0, "vocab", w.shape[1], f"mesh.model={model} cuts it; use a multiple of it")
  shards = dispatch.batch_shards()
  check(x.shape[0] % shards == 0, "batch", x.shape[0], f"use a multiple of replica x data = {shards}")
