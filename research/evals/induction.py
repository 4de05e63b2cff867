"""Induction heads: on a random row said twice, who looks at what followed the last time?"""

import jax
from jax import P
from jax import numpy as jnp
import numpy as np

from research.kernels.dispatch import place
from research.models.decoder import Decoder, log_likelihood


def induction_scores(model: Decoder, *, length: int = 64, rows: int = 16) -> dict[str, np.ndarray]:
  """Attention of every head on rows of `length` random tokens, each row repeated once.

  Means over the second half, float32 [layers, heads] each, all between 0 and 1 and
  uninformed about 1 / length:
    induction: attention to the token that followed this one the first time (the prefix
      matching score of Olsson et al., 2022, arXiv 2209.11895).
    previous: attention to the previous token.
    same: attention to this token's first standing. With a shift of keys and values
      induction may be done from there or from the token after next too; `next` is the latter.
  And scalars: nats_first, nats_second, the loss in each half; a model that does induction
  has the second near 0. They are all there is of a model without `attention_weights`.
  """
  tokens = jax.random.randint(jax.random.key(0), (rows, length), 0, model.cfg.vocab)
  tokens = jnp.concatenate([tokens, tokens], axis=1)
  positions = jnp.broadcast_to(jnp.arange(2 * length), tokens.shape)
  out = jax.jit(_measure, static_argnames="length")(model, tokens, jnp.ones_like(tokens), positions, length=length)
  return {name: np.asarray(x) for name, x in jax.device_get(out).items()}


def _measure(model, tokens, segment_ids, positions, length):
  logits = place(model.logits(tokens, segment_ids, positions), P(None, None, None))[:, :-1]
  nats = -log_likelihood(logits, tokens[:, 1:])
  losses = {"nats_first": jnp.mean(nats[:, : length - 1]), "nats_second": jnp.mean(nats[:, length:])}
  if not hasattr(model, "attention_weights"):
    return losses
  # a few small arrays: every device looks at all of them
  weights = place(model.attention_weights(tokens, segment_ids, positions), P(None, None, None, None, None))
  at = jnp.arange(length, 2 * length - 1)  # the last has no known successor
  look = lambda offset: jnp.mean(weights[..., at, at + offset], axis=(1, 3))
  looks = {"induction": 1 - length, "same": -length, "next": 2 - length, "previous": -1}
  return {name: look(offset) for name, offset in looks.items()} | losses
