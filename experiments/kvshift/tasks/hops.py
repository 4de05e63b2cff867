"""Multi-hop induction: induction on its own answer, k times (Sanford, Hsu & Telgarsky, 2024, arXiv 2402.09268)."""

import dataclasses
import functools

import numpy as np

from experiments.kvshift.tasks.rows import TRAIN_ROWS, VALIDATION_ROWS, answer_loss, row
from research.errors import check


@dataclasses.dataclass(frozen=True)
class HopsConfig:
  """Rows over `symbols` letters, each with its own number of hops, 1 .. `most`."""

  most: int = 8
  symbols: int = 4

  def __post_init__(self):
    check(self.most >= 1, "most", self.most, "must be at least 1")
    check(self.symbols >= 3, "symbols", self.symbols, "must be at least 3: no letter follows itself")

  @property
  def loss(self):
    return functools.partial(answer_loss, groups=self.most)

  @property
  def chance(self) -> float:
    """The accuracy of guessing."""
    return 1 / self.symbols


class HopsRows:
  """Rows "<k> x1 x2 ... xn": at every x_i the answer is the letter k hops back, `group` is k.

  One hop from i goes to the position just after the last earlier standing of x_i's
  letter: to j = max{j <= i : x_{j-1} = x_i}; no letter follows itself. Positions from which k hops cannot be made
  are not scored. Tokens: the letters, then one for each k.
  """

  def __init__(self, cfg: HopsConfig, vocab: int, length: int, seed: int, split: str):
    needed = cfg.symbols + cfg.most
    check(needed <= vocab, "hops.most", cfg.most, f"letters and numbers of hops must fit into model.vocab={vocab}")
    self.cfg, self.vocab, self.length = cfg, vocab, length
    self.seed = (seed, ("train", "validation").index(split))
    self.rows = TRAIN_ROWS if split == "train" else VALIDATION_ROWS

  def __len__(self) -> int:
    return self.rows

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((*self.seed, i))
    hops = 1 + i % self.cfg.most
    # never the same letter twice running, else a hop would stay where it is
    steps = rng.integers(1, self.cfg.symbols, size=self.length - 1)
    letters = (rng.integers(self.cfg.symbols) + np.cumsum(steps)) % self.cfg.symbols
    to = destinations(letters)
    at = np.arange(len(letters))
    for _ in range(hops):
      at = np.where(at >= 0, to[at], -1)
    tokens = np.append(self.cfg.symbols + hops - 1, letters)
    known = np.append(False, at >= 0)
    targets = np.append(0, np.where(at >= 0, letters[at], 0))
    return row(tokens, known, targets=targets) | {"group": np.full(self.length, hops, np.int32)}

  def __repr__(self) -> str:
    return f"HopsRows({self.cfg}, {self.vocab}, {self.length}, {self.seed})"


def destinations(letters: np.ndarray) -> np.ndarray:
  """int [n]: where one hop from each position goes, -1 where it goes nowhere."""
  last, to = {}, np.full(len(letters), -1)
  for i, letter in enumerate(letters.tolist()):
    to[i] = last.get(letter, -2) + 1
    last[letter] = i
  return to
