"""The n-gram task: which third token follows these two? A table to be learnt by heart."""

import dataclasses
import functools

import numpy as np

from experiments.kvshift.tasks.rows import TRAIN_ROWS, answer_loss, row
from research.errors import check


@dataclasses.dataclass(frozen=True)
class NgramConfig:
  """`triples` random (x1, x2) -> x3 over `symbols` tokens (arXiv 2411.19574, section 3.2: about 200)."""

  triples: int = 200
  symbols: int = 24

  loss = staticmethod(answer_loss)

  def __post_init__(self):
    check(self.symbols >= 2, "symbols", self.symbols, "must be at least 2")
    check(1 <= self.triples <= self.symbols**2, "triples", self.triples, f"lies in 1 .. symbols^2 = {self.symbols**2}")

  @property
  def chance(self) -> float:
    """The accuracy of guessing."""
    return 1 / self.symbols


VALIDATION_ROWS = 256  # as many triples as the table has, many times over


class NgramRows:
  """Rows "x1 x2 x3 x1 x2 x3 ..." of triples drawn from one table; scored is the prediction of each x3.

  No x3 is known from x1 or x2 alone: every pair has its own, drawn uniformly. The table
  depends on the seed; both splits share it, as there is nothing but the table to learn.
  """

  def __init__(self, cfg: NgramConfig, vocab: int, length: int, seed: int, split: str):
    check(cfg.symbols <= vocab, "ngram.symbols", cfg.symbols, f"must fit into model.vocab={vocab}")
    check(length >= 3, "length", length, "a row needs a triple: 3 tokens")
    self.cfg, self.vocab, self.length = cfg, vocab, length
    self.seed, self.table_seed = (seed, ("train", "validation").index(split)), (seed, 2)
    self.rows = TRAIN_ROWS if split == "train" else VALIDATION_ROWS

  @functools.cached_property
  def table(self) -> np.ndarray:
    """int [triples, 3]."""
    rng = np.random.default_rng(self.table_seed)
    pairs = rng.choice(self.cfg.symbols**2, size=self.cfg.triples, replace=False)
    thirds = rng.integers(self.cfg.symbols, size=self.cfg.triples)
    return np.stack([pairs // self.cfg.symbols, pairs % self.cfg.symbols, thirds], axis=1)

  def __len__(self) -> int:
    return self.rows

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((*self.seed, i))
    tokens = self.table[rng.integers(self.cfg.triples, size=-(-self.length // 3))].reshape(-1)[: self.length]
    at = np.arange(self.length)
    return row(tokens, (at % 3 == 1) & (at < self.length - 1))

  def __repr__(self) -> str:
    return f"NgramRows({self.cfg}, {self.vocab}, {self.length}, {self.seed})"
