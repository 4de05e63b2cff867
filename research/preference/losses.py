"""Losses on preferences: pure functions of log-probabilities, reference log-probabilities, preference and mask.

Arrays. Of pairs: `logp` and `reference` [batch, 2, length] of the tokens of two responses, `mask` of the same shape
and `preference` [batch], the probability that response 0 beats response 1: 1 for a chosen and a rejected one, any
number between for a soft label. Of single responses: [batch, length]. The mask may be any weight >= 0 a token; where
it is 0 nothing is read, NaN included, and a response without tokens has log-probability 0.

`reduce`, the one switch there is: "sum" takes log-probabilities of whole responses; "mean" divides each response's by
its own (weighted) count of tokens before anything else. IPO is published with the mean by some and the sum by others.

Every function returns one number a row, [batch]; `over_rows` makes the `Mean` that accumulation and sharding add up
exactly. What needs a mean over the batch (KTO's baseline, BCO's shift) is asked for as an argument, and made by a
function that returns a Mean too: micro-batches add theirs up before the first gradient. Gradients reach `logp` only;
reference, preference, baseline and shift are constants.

Notation: d = log pi / r of a response, h = d_0 - d_1, p the preference, b the weight of the KL term (IPO's tau).
"""

from collections.abc import Callable
from typing import Literal

import jax
from jax import numpy as jnp

from research.errors import check
from research.metrics import Mean

Reduce = Literal["sum", "mean"]


def over_rows(rows: jax.Array, weights: jax.Array | None = None) -> Mean:
  """Rows [batch], counted with `weights` [batch] (0: padding; None: 1 each)."""
  rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
  if weights is None:
    return Mean(jnp.sum(rows), jnp.full((), rows.size, rows.dtype))
  weights = weights.astype(rows.dtype)
  return Mean(jnp.sum(rows * weights), jnp.sum(weights))


def log_prob(logp: jax.Array, mask: jax.Array, reduce: Reduce = "sum") -> jax.Array:
  """Of responses, from their tokens': [..., length] -> [...], in float32 or wider. Raises UserError."""
  check(reduce in ("sum", "mean"), "reduce", reduce, "use sum or mean")
  check(logp.shape == mask.shape, "mask", mask.shape, f"must have the log-probabilities' shape {logp.shape}")
  dtype = jnp.promote_types(logp.dtype, jnp.float32)
  mask = mask.astype(dtype)
  # selected before it is multiplied: 0 * NaN is NaN, in the gradient too
  total = jnp.sum(jnp.where(mask > 0, logp, 0).astype(dtype) * mask, axis=-1)
  if reduce == "sum":
    return total
  count = jnp.sum(mask, axis=-1)
  return total / jnp.where(count > 0, count, 1)


def log_ratio(logp: jax.Array, reference: jax.Array, mask: jax.Array, reduce: Reduce = "sum") -> jax.Array:
  """d = log pi / r of responses, [..., length] -> [...]; no gradient through the reference."""
  return log_prob(logp, mask, reduce) - jax.lax.stop_gradient(log_prob(reference, mask, reduce))


def contrast(logp: jax.Array, reference: jax.Array, mask: jax.Array, reduce: Reduce = "sum") -> jax.Array:
  """h = d_0 - d_1 of pairs, [batch, 2, length] -> [batch]."""
  check(logp.ndim == 3 and logp.shape[1] == 2, "logp", logp.shape, "must be [batch, 2, length]")
  d = log_ratio(logp, reference, mask, reduce)
  return d[:, 0] - d[:, 1]


def dpo(logp, reference, preference, mask, *, b: float, smoothing: float = 0.0, reduce: Reduce = "sum") -> jax.Array:
  """-p log s(b h) - (1 - p) log s(-b h), s the sigmoid: DPO (arXiv 2305.18290, eq. 7), online or not.

  smoothing e: labels are wrong with probability e, and p becomes (1 - e) p + e (1 - p) (conservative DPO).
  """
  z = b * contrast(logp, reference, mask, reduce)
  p = _constant(preference, z)
  p = (1 - smoothing) * p + smoothing * (1 - p)
  return -p * jax.nn.log_sigmoid(z) - (1 - p) * jax.nn.log_sigmoid(-z)


def ipo(logp, reference, preference, mask, *, b: float, reduce: Reduce = "sum") -> jax.Array:
  """(h - (p - 1/2) / b)^2: IPO (arXiv 2310.12036, eq. 17), where p = 1 gives its target 1 / (2 b).

  On pairs of the policy itself, online IPO's second form (arXiv 2403.08635): its gradient's mean is the same with
  coin tosses for p. On pairs of the mixture of policy and reference, IPO-MD.
  """
  h = contrast(logp, reference, mask, reduce)
  return jnp.square(h - (_constant(preference, h) - 0.5) / b)


def ipo_against(logp, reference, preference, mask, *, b: float, reduce: Reduce = "sum") -> jax.Array:
  """(h - (p_0 - p_1) / b)^2, `preference` [batch, 2] of each response against an opponent's third one.

  Online IPO's first form, and with other opponents Nash-MD and EGPO (arXiv 2503.08942): pairs are to be uniform.
  """
  h = contrast(logp, reference, mask, reduce)
  p = _constant(preference, h)
  check(p.shape == (*h.shape, 2), "preference", p.shape, f"must be [batch, 2] = {(*h.shape, 2)}")
  return jnp.square(h - (p[:, 0] - p[:, 1]) / b)


def sppo(logp, reference, preference, mask, *, b: float, reduce: Reduce = "sum") -> jax.Array:
  """Mean over responses of (d - (p - 1/2) / b)^2: SPPO (arXiv 2405.00675), b = 1 / eta.

  Of any number k of responses: logp, mask [batch, k, length]; `preference` [batch, k] against the policy that the
  reference is here, the last iteration's.
  """
  d = log_ratio(logp, reference, mask, reduce)
  return jnp.mean(jnp.square(d - (_constant(preference, d) - 0.5) / b), axis=-1)


def inpo(logp, reference, previous, preference, mask, *, eta: float, b: float, reduce: Reduce = "sum") -> jax.Array:
  """(h_t - (p - 1/2) / eta)^2: INPO (arXiv 2407.00617), on pairs of the last policy, whose log-probs are `previous`.

  h_t is the contrast of log pi - (b / eta) log r - (1 - b / eta) log pi_t; eta is an inverse step, as in the paper.
  """
  share = b / eta
  h = contrast(logp, share * reference + (1 - share) * previous, mask, reduce)
  return jnp.square(h - (_constant(preference, h) - 0.5) / eta)


def onpo(logp, anchor, preference, mask, *, eta: float, reduce: Reduce = "sum") -> jax.Array:
  """(g - eta (p - 1/2))^2, g the contrast of log pi / anchor: ONPO (arXiv 2502.16852), no KL to a reference.

  Each iteration fits twice from the same anchor pi'_t: on pairs of the last played policy, which gives pi_t to play,
  and on pairs of pi_t, which gives the next anchor.
  """
  return ipo(logp, anchor, preference, mask, b=1 / eta, reduce=reduce)


def nash_md(logp, reference, preference, mask, *, b: float) -> jax.Array:
  """A policy gradient of -(P(y, y'') - 1/2 - b log pi / r (y)), y of the policy: Nash-MD-PG (arXiv 2312.00886).

  Single responses [batch, length], `preference` [batch] against the mixture's. A token's score is weighted by the
  log-ratios of itself and of all tokens after it: those before add nothing in the mean, and its own alone is biased
  for more than one token. Whole responses only: a mean over tokens has another gradient. The value is the objective's.
  """
  dtype = jnp.promote_types(logp.dtype, jnp.float32)
  logp, reference = (jnp.where(mask > 0, x, 0).astype(dtype) * mask.astype(dtype) for x in (logp, reference))
  ratios = jax.lax.stop_gradient(logp - reference)
  to_go = jnp.flip(jnp.cumsum(jnp.flip(ratios, -1), axis=-1), -1)
  gain = _constant(preference, ratios) - 0.5
  surrogate = -jnp.sum(logp * (gain[:, None] - b * to_go), axis=-1)
  value = b * jnp.sum(ratios, axis=-1) - gain
  return surrogate + jax.lax.stop_gradient(value - surrogate)


def xpo(
  logp,
  reference,
  preference,
  mask,
  *,
  b: float,
  alpha: float,
  loss: Callable[..., jax.Array] = dpo,
  reduce: Reduce = "sum",
) -> jax.Array:
  """DPO's loss plus alpha log pi(y_1): XPO (arXiv 2405.21046, algorithm 1), on all pairs so far, not the last batch's.

  Response 0 is the policy's and response 1 the reference's, whichever won. PLUS, in a loss to be minimised:
  mass leaves what the reference shows. `loss`: what takes `dpo`'s arguments.
  """
  return loss(logp, reference, preference, mask, b=b, reduce=reduce) + alpha * log_prob(logp[:, 1], mask[:, 1])


def extrapolated(logp: jax.Array, previous: jax.Array, coefficient: float) -> jax.Array:
  """log pi + a (log pi - log pi_previous): APO's momentum over policies (arXiv 2410.06293), any shape.

  The reference of the next iteration of DPO, IPO or SPPO. Not normalised: the constant of a prompt falls out of a
  contrast, and not out of SPPO's single responses.
  """
  return jax.lax.stop_gradient(logp + coefficient * (logp - previous))


def kto_baseline(
  logp: jax.Array,
  reference: jax.Array,
  mask: jax.Array,
  *,
  weights: jax.Array | None = None,
  reduce: Reduce = "sum",
) -> Mean:
  """d over responses to other rows' prompts, [batch, length]: add up over the batch; `kto` takes its value.

  weights: [batch], 0 for rows that are padding, as in `over_rows`.
  """
  return over_rows(jax.lax.stop_gradient(log_ratio(logp, reference, mask, reduce)), weights)


def kto(
  logp, reference, desirable, mask, baseline, *, b: float, weights: tuple[float, float] = (1.0, 1.0), reduce="sum"
) -> jax.Array:
  """w_d (1 - s(b (d - z))) of desirable responses and w_u (1 - s(b (z - d))) of the others: KTO (arXiv 2402.01306).

  z = max(0, baseline), the mean of `kto_baseline` over the whole batch. desirable: [batch], 0 or 1.
  """
  d = log_ratio(logp, reference, mask, reduce)
  z = jnp.maximum(_constant(baseline, d), 0)
  liked = desirable > 0
  sign = jnp.where(liked, 1.0, -1.0).astype(d.dtype)
  weight = jnp.where(liked, weights[0], weights[1]).astype(d.dtype)
  return weight * jax.nn.sigmoid(-b * sign * (d - z))


def bco_shift(
  logp: jax.Array,
  reference: jax.Array,
  mask: jax.Array,
  *,
  b: float,
  weights: jax.Array | None = None,
  reduce: Reduce = "sum",
) -> Mean:
  """b d over a batch. The sum over all batches so far, this one among them, gives the running mean `bco` takes.

  weights: [batch], 0 for rows that are padding; density ratios are not for the shift.
  """
  return over_rows(jax.lax.stop_gradient(b * log_ratio(logp, reference, mask, reduce)), weights)


def bco(logp, reference, desirable, mask, shift, *, b: float, reduce: Reduce = "sum") -> jax.Array:
  """-log s(b d - shift) of desirable responses and -log s(shift - b d) of the others: BCO (arXiv 2404.04656).

  shift: the value of `bco_shift`, one for the whole batch: one a micro-batch changes the gradients. Density-ratio
  weights are row weights of `over_rows`, up to the count that divides.
  """
  z = b * log_ratio(logp, reference, mask, reduce)
  z = z - _constant(shift, z)
  return -jax.nn.log_sigmoid(jnp.where(desirable > 0, z, -z))


def listwise(logp, reference, quality, mask, *, b: float, reduce: Reduce = "sum") -> jax.Array:
  """sum over i, j with quality_i > quality_j of w_ij log(1 + exp(-b (d_i - d_j))): a list of k responses, ranked.

  w_ij = |2^quality_i - 2^quality_j| |1 / log2(1 + rank_i) - 1 / log2(1 + rank_j)|, ranks from 1 by d: LambdaLoss
  (Burges, 2010), as tree preference optimisation uses it (arXiv 2410.12854); k = 2 is DPO times a weight. A better
  order has a lower loss; in the paper's public code it is wrapped so that it has a higher one. Weights of steps
  (`step_weights`) go into the mask. logp, mask [batch, k, length]; quality [batch, k], such as win rates.
  """
  d = log_ratio(logp, reference, mask, reduce)
  quality = _constant(quality, d)
  rank = 1 + jnp.argsort(jnp.argsort(-jax.lax.stop_gradient(d), axis=-1), axis=-1)
  gain, discount = jnp.exp2(quality), 1 / jnp.log2(1.0 + rank)
  outer = lambda x: x[:, :, None] - x[:, None, :]
  weight = jnp.where(outer(quality) > 0, jnp.abs(outer(gain) * outer(discount)), 0)
  return jnp.sum(weight * jax.nn.softplus(-b * outer(d)), axis=(1, 2))


def step_weights(steps: jax.Array, best: jax.Array) -> jax.Array:
  """1 + cosine of hidden states of steps with the best response's, [..., width] twice -> [...] (arXiv 2410.12854)."""
  norm = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-9)
  return jax.lax.stop_gradient(1 + jnp.sum(norm(steps) * norm(best), axis=-1))


def _constant(x: jax.Array, like: jax.Array) -> jax.Array:
  return jax.lax.stop_gradient(jnp.asarray(x).astype(like.dtype))
