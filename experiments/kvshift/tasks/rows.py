"""What a row of a synthetic task is, and the loss of all of them."""

import jax
from jax import numpy as jnp
import numpy as np

from research.metrics import Mean
from research.models.transformer import Transformer


def row(tokens: np.ndarray, weights: np.ndarray, scored: np.ndarray | None = None) -> dict[str, np.ndarray]:
  """One document of `tokens` int [length] as a row of a batch.

  weights [length]: how much the prediction made at each position, of the token after it, counts in the loss;
  scored [length]: where accuracy is taken (default: where `weights` is not 0).
  """
  length = len(tokens)
  return {
    "tokens": tokens.astype(np.int32),
    "targets": np.append(tokens[1:], 0).astype(np.int32),
    "segment_ids": np.ones(length, np.int32),
    "positions": np.arange(length, dtype=np.int32),
    "weights": weights.astype(np.float32),
    "scored": (weights != 0 if scored is None else scored).astype(np.float32),
  }


def answer_loss(model: Transformer, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, Mean]:
  """Cross-entropy by `weights` and accuracy where `scored`; the vocabulary is small enough for all logits."""
  del key  # deterministic
  logits = model.logits(batch["tokens"], batch["segment_ids"], batch["positions"])
  targets, weights, scored = batch["targets"], batch["weights"], batch["scored"]
  # a comparison, not a gather: the vocabulary may be cut along the mesh
  is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
  right = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
  nll = jax.nn.logsumexp(logits, axis=-1) - right
  correct = right == jnp.max(logits, axis=-1)
  return {
    "loss": Mean(jnp.sum(weights * nll), jnp.sum(weights)),
    "accuracy": Mean(jnp.sum(scored * correct), jnp.sum(scored)),
  }
