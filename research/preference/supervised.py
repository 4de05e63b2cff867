"""Supervised fine-tuning: the next token of chosen responses, and of nothing else in the row."""

from typing import Any

import jax
from jax import numpy as jnp

from research.kernels.dispatch import place
from research.mesh import BATCH, TOKENS
from research.metrics import Mean
from research.models.decoder import Decoder, next_token_loss


def loss(model: Decoder, batch: dict[str, jax.Array], key: Any) -> dict[str, Mean]:
  """Cross-entropy in nats a token of the chosen responses, their ends included, after their prompts.

  batch: of `research.data.preferences`. Tokens of prompts are read and not learnt; padding is neither.
  """
  return next_token_loss(model, rows(batch), key)


def rows(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """A batch of preferences as one of `next_token_loss`: [batch, prompt + response - 1], weights on responses alone.

  Positions count from the prompt's first token, however much padding stands to its left.
  """
  prompts, lengths = place(batch["prompts"], TOKENS), place(batch["lengths"], jax.P(BATCH))
  response, mask = (place(batch[name][:, 0], TOKENS) for name in ("responses", "mask"))
  before = prompts.shape[1]
  ids = jnp.concatenate([prompts, response], axis=1)
  at = jnp.arange(ids.shape[1] - 1) - (before - lengths[:, None])
  learnt = jnp.concatenate([jnp.zeros_like(prompts, mask.dtype), mask], axis=1)[:, 1:]
  return {
    "tokens": place(ids[:, :-1], TOKENS),
    "targets": place(ids[:, 1:], TOKENS),
    "segment_ids": (at >= 0).astype(jnp.int32),
    "positions": jnp.maximum(at, 0),
    "weights": place(learnt, TOKENS) * place(batch["weights"], jax.P(BATCH))[:, None],
  }
