"""The induction task: what followed this token the last time it stood here?

The paper's generator (appendix D) contradicts itself after the first repetition;
this one is clean: in every row each key is always followed by the same value.
"""

import dataclasses

import numpy as np

from experiments.kvshift.tasks.rows import row
from research.errors import check


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

  A row is a dict of [length] arrays as `tasks.rows.row` makes it; `weights` is 1 where a
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
    return row(tokens, weights)

  def __repr__(self) -> str:
    return f"InductionRows({self.cfg}, {self.vocab}, {self.length}, {self.seed})"
