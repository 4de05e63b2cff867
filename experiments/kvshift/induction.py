"""The induction task: what followed this token the last time it stood here?

The paper's generator (appendix D) contradicts itself after the first repetition;
this one is clean: in every row each key is always followed by the same value.
"""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np

from research.errors import check
from research.metrics import Mean
from research.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class InductionConfig:
  """`keys` pairs of distinct tokens a row, drawn anew for each row from the model's vocabulary."""

  keys: int = 16
  train_rows: int = 1 << 20
  validation_rows: int = 512

  def __post_init__(self):
    for name in ("keys", "train_rows", "validation_rows"):
      check(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")


class InductionRows:
  """Random access to rows "k v k v ..."; row i depends only on (seed, split, i).

  A row is a dict of [length] arrays as in `research.data`; `weights` is 1 where a
  key stands that has stood in the row before, so that its value can be known, else 0.
  """

  def __init__(self, cfg: InductionConfig, vocab: int, length: int, seed: int, split: str):
    check(length % 2 == 0, "length", length, "must be even: induction rows are pairs")
    check(2 * cfg.keys <= vocab, "induction.keys", cfg.keys, f"two tokens a key must fit into model.vocab={vocab}")
    self.cfg, self.vocab, self.length = cfg, vocab, length
    self.seed = (seed, ("train", "validation").index(split))
    self.rows = cfg.train_rows if split == "train" else cfg.validation_rows

  def __len__(self) -> int:
    return self.rows

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((*self.seed, i))
    keys, values = rng.choice(self.vocab, size=(2, self.cfg.keys), replace=False).astype(np.int32)
    drawn = rng.integers(self.cfg.keys, size=self.length // 2)
    tokens = np.stack([keys[drawn], values[drawn]], axis=1).reshape(-1)
    weights = np.zeros(self.length, np.float32)
    first = np.unique(drawn, return_index=True)[1]
    weights[::2] = 1
    weights[2 * first] = 0
    return {
      "tokens": tokens,
      "targets": np.append(tokens[1:], np.int32(0)),
      "segment_ids": np.ones(self.length, np.int32),
      "positions": np.arange(self.length, dtype=np.int32),
      "weights": weights,
    }

  def __repr__(self) -> str:
    return f"InductionRows({self.cfg}, {self.vocab}, {self.length}, {self.seed})"


def induction_loss(model: Transformer, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, Mean]:
  """Cross-entropy and accuracy where the answer has been seen; the vocabulary is small enough for all logits."""
  del key  # deterministic
  logits = model.logits(batch["tokens"], batch["segment_ids"], batch["positions"])
  targets, weights = batch["targets"], batch["weights"]
  # a comparison, not a gather: the vocabulary may be cut along the mesh
  is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
  right = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
  nll = jax.nn.logsumexp(logits, axis=-1) - right
  weight = jnp.sum(weights)
  correct = jnp.sum(weights * (right == jnp.max(logits, axis=-1)))
  return {"loss": Mean(jnp.sum(weights * nll), weight), "accuracy": Mean(correct, weight)}
