"""The induction task: what followed this token the last time it stood here?"""

from collections.abc import Iterator
import dataclasses
from typing import Literal

import numpy as np

from experiments.kvshift.tasks.rows import TRAIN_ROWS, VALIDATION_ROWS, answer_loss, row
from research.errors import check


@dataclasses.dataclass(frozen=True)
class InductionConfig:
  """Whose rows, and of how many tokens.

  clean: `keys` pairs of distinct tokens a row, drawn anew for each row from the model's
    vocabulary, so that each key is always followed by the same value; scored wherever a
    key stands that has stood in the row before.
  paper: the rule of arXiv 2411.19574, appendix D, on a pool of `keys` tokens; the loss is
    taken everywhere, and only the first repetition is scored, the only one that is
    always consistent.
  """

  generator: Literal["clean", "paper"] = "clean"
  keys: int = 16

  loss = staticmethod(answer_loss)

  def __post_init__(self):
    check(self.keys >= 1, "keys", self.keys, "must be at least 1")

  @property
  def chance(self) -> float:
    """The accuracy of guessing among what may follow."""
    return 1 / self.keys


class InductionRows:
  """Random access to rows as `tasks.rows.row` makes them; row i depends only on (seed, split, i)."""

  def __init__(self, cfg: InductionConfig, vocab: int, length: int, seed: int, split: str):
    if cfg.generator == "clean":
      check(length % 2 == 0, "length", length, "must be even: induction rows are pairs")
      check(2 * cfg.keys <= vocab, "induction.keys", cfg.keys, f"two tokens a key must fit into model.vocab={vocab}")
    else:
      check(cfg.keys >= 3, "induction.keys", cfg.keys, "the paper's rule needs a pool of at least 3 tokens")
      check(cfg.keys <= vocab, "induction.keys", cfg.keys, f"the pool must fit into model.vocab={vocab}")
      # with a pool much larger than the row nothing ever repeats, and rows without repetition are redrawn
      fix = f"rows of {length} hardly repeat a token of so many; use less than {length**2}"
      check(cfg.keys < length**2, "induction.keys", cfg.keys, fix)
    self.cfg, self.vocab, self.length = cfg, vocab, length
    self.seed = (seed, ("train", "validation").index(split))
    self.rows = TRAIN_ROWS if split == "train" else VALIDATION_ROWS

  def __len__(self) -> int:
    return self.rows

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((*self.seed, i))
    return self._clean(rng) if self.cfg.generator == "clean" else self._paper(rng)

  def __repr__(self) -> str:
    return f"InductionRows({self.cfg}, {self.vocab}, {self.length}, {self.seed})"

  def _clean(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
    keys, values = rng.choice(self.vocab, size=(2, self.cfg.keys), replace=False).astype(np.int32)
    drawn = rng.integers(self.cfg.keys, size=self.length // 2)
    tokens = np.stack([keys[drawn], values[drawn]], axis=1).reshape(-1)
    weights = np.zeros(self.length, np.float32)
    first = np.unique(drawn, return_index=True)[1]
    weights[::2] = 1
    weights[2 * first] = 0
    return row(tokens, weights)

  def _paper(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
    pool = rng.choice(self.vocab, size=self.cfg.keys, replace=False)
    repeats: list[int] = []
    while not repeats or repeats[0] > self.length - 2:
      tokens, repeats = literal_rule((int(pool[j]) for j in iter(lambda: rng.integers(len(pool)), None)), self.length)
    tokens = np.array(tokens[: self.length], np.int32)
    known = tokens >= 0
    scored = np.zeros(self.length)
    scored[repeats[0]] = 1
    # A -1 is no token: it is read as token 0, and neither predicted nor predicted from.
    weights = known & np.append(known[1:], False)
    return row(np.where(known, tokens, 0), weights, scored)


def literal_rule(draws: Iterator[int], length: int) -> tuple[list[int], list[int]]:
  """(row of at least `length`, indices where a token stands again) by the rule of appendix D, from drawn tokens.

  A token that has stood before is followed at once by what was last noted as its
  successor: -1, if it then ended such a pair. 18 % of the later repetitions disagree with
  the token's latest occurrence; the first one never does.
  """
  row, successor, repeats = [], {}, []
  while len(row) < length:
    token = next(draws)
    if row and token == row[-1]:
      continue
    if token in successor:
      repeats.append(len(row))
      row += [token, successor[token]]
    else:
      if row:
        successor[row[-1]] = token
      successor[token] = -1
      row.append(token)
  return row, repeats
