"""Token-level losses on logits: a teacher made of two preference models, and imitation of a batch's best.

logits [batch, length, vocab], mask [batch, length] (weights >= 0; where it is 0 nothing is read). One number a row,
as in `research.preference.losses`, with the same switch between sum and mean over a response's tokens.
"""

import jax
from jax import numpy as jnp

from research.models.decoder import log_likelihood
from research.preference.losses import Reduce, log_prob


def token_kl(logits: jax.Array, others: jax.Array) -> jax.Array:
  """KL(softmax(logits) || softmax(others)) of every position in nats, [..., vocab] -> [...]."""
  log_p, log_q = jax.nn.log_softmax(logits, axis=-1), jax.nn.log_softmax(others, axis=-1)
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def contrastive_teacher(preferring: jax.Array, reversed_: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
  """(teacher's logits z + w (z - z_reversed), w [..., 1]), w = scale sum |p - p_reversed| + 1e-3 of every position.

  preferring, reversed_: logits of a model trained by DPO and of one trained on reversed pairs. AlignDistil
  (arXiv 2503.02832), scale 10 off policy and 15 on policy.
  """
  apart = jnp.abs(jax.nn.softmax(preferring, axis=-1) - jax.nn.softmax(reversed_, axis=-1))
  w = scale * jnp.sum(apart, axis=-1, keepdims=True) + 1e-3
  return preferring + w * (preferring - reversed_), w


def aligndistil(
  logits: jax.Array,
  preferring: jax.Array,
  reversed_: jax.Array,
  mask: jax.Array,
  *,
  b: float,
  scale: float,
  reduce: Reduce = "mean",
) -> jax.Array:
  """(b / w) KL(policy || teacher) of every token, [batch]: AlignDistil (arXiv 2503.02832)."""
  teacher, w = jax.lax.stop_gradient(contrastive_teacher(_read(preferring, mask), _read(reversed_, mask), scale))
  return log_prob(b / w[..., 0] * token_kl(_read(logits, mask), teacher), mask, reduce)


def superhf(
  logits: jax.Array, base: jax.Array, tokens: jax.Array, mask: jax.Array, *, b: float, reduce: Reduce = "mean"
) -> jax.Array:
  """-log pi(tokens) + b KL(policy || base) of every token, [batch]: SuperHF (arXiv 2310.16763).

  tokens: int32 [batch, length], the best response of each superbatch, as `best_of` chooses it.
  """
  logits, base = _read(logits, mask), jax.lax.stop_gradient(_read(base, mask))
  return log_prob(b * token_kl(logits, base) - log_likelihood(logits, tokens), mask, reduce)


def best_of(wins: jax.Array) -> jax.Array:
  """int32 [batch]: the response that wins most against the others of its superbatch, from P [batch, k, k].

  Win rates exist where scores do not; ties go to the first.
  """
  return jnp.argmax(jnp.mean(wins, axis=-1), axis=-1).astype(jnp.int32)


def _read(logits: jax.Array, mask: jax.Array) -> jax.Array:
  """Logits in float32 or wider, 0 where nothing is to be read."""
  return jnp.where(mask[..., None] > 0, logits, 0).astype(jnp.promote_types(logits.dtype, jnp.float32))
