"""What a row of a synthetic task is, and the loss of all of them."""

import jax
from jax import numpy as jnp
import numpy as np

from research.metrics import Mean
from research.models.transformer import Transformer

TRAIN_ROWS, VALIDATION_ROWS = 1 << 20, 512  # each is drawn when it is read; no run reads more


def row(
  tokens: np.ndarray,
  weights: np.ndarray,
  scored: np.ndarray | None = None,
  targets: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """One document of `tokens` int [length] as a row of a batch.

  weights [length]: how much the prediction made at each position counts in the loss.
  scored [length]: where accuracy is taken (default: where `weights` is not 0).
  targets [length]: what is to be predicted (default: the next token).
  """
  length = len(tokens)
  return {
    "tokens": tokens.astype(np.int32),
    "targets": (np.append(tokens[1:], 0) if targets is None else targets).astype(np.int32),
    "segment_ids": np.ones(length, np.int32),
    "positions": np.arange(length, dtype=np.int32),
    "weights": weights.astype(np.float32),
    "scored": (weights != 0 if scored is None else scored).astype(np.float32),
  }


def answer_loss(
  model: Transformer, batch: dict[str, jax.Array], key: jax.Array, *, groups: int = 0, rows: bool = False
) -> dict[str, Mean]:
  """Cross-entropy by `weights` and accuracy where `scored`; the vocabulary is small enough for all logits.

  groups: also accuracy_1 ... accuracy_<groups>, each of the rows whose `group` [batch, length] is that number.
  rows: also rows_right, the share of rows right wherever scored; then greedy decoding gives all of the row's answer.
  """
  del key  # deterministic
  logits = model.logits(batch["tokens"], batch["segment_ids"], batch["positions"])
  targets, weights, scored = batch["targets"], batch["weights"], batch["scored"]
  # a comparison, not a gather: the vocabulary may be cut along the mesh
  is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
  right = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
  nll = jax.nn.logsumexp(logits, axis=-1) - right
  correct = right == jnp.max(logits, axis=-1)
  accuracy = lambda where: Mean(jnp.sum(where * correct), jnp.sum(where))
  means = {"loss": Mean(jnp.sum(weights * nll), jnp.sum(weights)), "accuracy": accuracy(scored)}
  means |= {f"accuracy_{g}": accuracy(scored * (batch["group"] == g)) for g in range(1, groups + 1)}
  if rows:
    counts = jnp.any(scored > 0, axis=1)  # not the rows that fill up the last batch
    whole = counts & jnp.all(correct | (scored == 0), axis=1)
    means["rows_right"] = Mean(jnp.sum(whole, dtype=jnp.float32), jnp.sum(counts, dtype=jnp.float32))
  return means
