"""A pairwise judge: a decoder of the zoo that has read a prompt and two responses, and says which is better.

Its head is two rows of the decoder's own: the log-odds that the first response wins are the difference of the logits
of two ids, whatever text these stand for. So a judge is a plain model of the zoo: it starts from published weights or
from the policy's, trains under every mesh, and is written as its family's files. It is asked in both orders
(`oracles.Learned`), which makes P(y, y2) + P(y2, y) = 1 hold by construction; a judge with one score a response
could not go in circles, one that reads both together can.
"""

import functools
from typing import Any

import jax
from jax import numpy as jnp

from research.kernels.dispatch import place
from research.mesh import HIDDEN, TOKENS
from research.metrics import Mean
from research.models.decoder import Decoder
from research.preference.losses import over_rows
from research.preference.oracles import Learned
from research.preference.samplers import Responses

VERDICTS = (0, 1)  # the ids whose logits say that the first, or the second, response is better


def oracle(model: Decoder, stop: int) -> Learned:
  """The judge as an oracle on batches with `prompts` and `lengths`; no gradient of a policy reaches it."""
  return Learned(model, functools.partial(log_odds, stop=stop))


def log_odds(model: Decoder, prompt: dict[str, jax.Array], y: Responses, y2: Responses, *, stop: int) -> jax.Array:
  """float32 [batch]: log-odds that y is better than y2, read in this order.

  prompt: prompts int32 [batch, length], padded on the left, and lengths [batch]. Between the parts stands `stop`, once
  more where a response ends with it: one that was cut off ends too, and an empty one has its place. Padding inside the
  row is a segment of its own, and positions count what is left: a row means the same however it is padded.
  """
  tokens, seen = row(prompt, y, y2, stop)
  positions = jnp.maximum(jnp.cumsum(seen, axis=1) - 1, 0)
  x = model(tokens, seen, positions)
  logits = model.unembed(place(x[:, -1:], HIDDEN))[:, 0]
  # a comparison, not a gather: the vocabulary may be cut along the mesh
  ids = jnp.arange(logits.shape[-1])
  sign = (ids == VERDICTS[0]).astype(logits.dtype) - (ids == VERDICTS[1]).astype(logits.dtype)
  return jnp.sum(logits * sign, axis=-1)


def row(prompt: dict[str, jax.Array], y: Responses, y2: Responses, stop: int) -> tuple[jax.Array, jax.Array]:
  """What the judge reads, prompt, y, `stop`, y2, `stop`: int32 (tokens, 1 where they are no padding)."""
  prompts, lengths = prompt["prompts"], prompt["lengths"]
  batch, before = prompts.shape
  at = jnp.arange(before) >= before - lengths[:, None]
  end = jnp.full((batch, 1), stop, jnp.int32)
  parts = [(prompts, at), (y.tokens, y.mask > 0), (end, end == end), (y2.tokens, y2.mask > 0), (end, end == end)]
  # each under one spec before they are joined
  tokens, seen = (jnp.concatenate([place(part[i], TOKENS) for part in parts], axis=1) for i in (0, 1))
  return jnp.where(seen, tokens, 0), seen.astype(jnp.int32)


def chosen_and_rejected(batch: dict[str, jax.Array]) -> tuple[Responses, Responses]:
  """The two responses of a batch of `research.data.preferences`."""
  return tuple(Responses(place(batch["responses"][:, i], TOKENS), place(batch["mask"][:, i], TOKENS)) for i in range(2))


def loss(model: Decoder, batch: dict[str, jax.Array], key: Any, *, stop: int) -> dict[str, Mean]:
  """Cross-entropy in nats of the chosen response being better, and how often the oracle says so, under a judge.

  batch: of `research.data.preferences`. Every pair is read in both orders, each an example of its own, as in EGPO's
  public code: nothing has to be shuffled, and a judge that goes by the place learns not to. Not the cross-entropy of
  the oracle's mean of both, which is lower and flat where the judge is sure of the place.
  """
  del key  # deterministic
  chosen, rejected = chosen_and_rejected(batch)
  there = log_odds(model, batch, chosen, rejected, stop=stop)
  back = log_odds(model, batch, rejected, chosen, stop=stop)
  nats = (jax.nn.softplus(-there) + jax.nn.softplus(back)) / 2
  p = (jax.nn.sigmoid(there) + jax.nn.sigmoid(-back)) / 2
  right = jnp.where(jnp.abs(p - 0.5) < 1e-6, 0.5, p > 0.5)  # of two that were cut to the same
  return {name: over_rows(x, batch["weights"]) for name, x in (("loss", nats), ("accuracy", right))}
