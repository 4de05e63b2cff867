"""Arithmetic word problems without the words: name, look up, compute, step by step.

In the spirit of iGSM (Ye et al., 2024, arXiv 2407.20311), on which the paper's table 7 is
taken; the generator is our own. A problem is a shuffled list of definitions,

  c = a + b ; a = 7 ; d = c * a ; b = 11 ; e = b ;  ? d

of which only some are needed, and its solution computes those, operands before what
needs them and the left before the right, then says the answer:

  a = 7 ; b = 11 ; c = 7 + 11 = 18 ; d = 18 * 7 = 11 ; ! 11

All numbers are tokens of their own, modulo `modulus`.
"""

import dataclasses
import functools

import numpy as np

from experiments.kvshift.tasks.rows import TRAIN_ROWS, VALIDATION_ROWS, answer_loss, row
from research.errors import check

SYMBOLS = ("=", "+", "-", "*", ";", "?", "!", ".")
NAMES = 20


@dataclasses.dataclass(frozen=True)
class MathConfig:
  """Problems that need `train_least` .. `train_most` definitions are for training, those that need `test` the test."""

  train_least: int = 2
  train_most: int = 4
  test: int = 5
  distractors: int = 2  # further definitions, which are not needed
  modulus: int = 23

  def __post_init__(self):
    check(self.train_least >= 1, "train_least", self.train_least, "must be at least 1")
    check(self.train_most >= self.train_least, "train_most", self.train_most, f"is below {self.train_least}")
    check(self.distractors >= 0, "distractors", self.distractors, "must be at least 0")
    check(self.modulus >= 2, "modulus", self.modulus, "must be at least 2")
    most = max(self.train_most, self.test) + self.distractors
    check(self.test >= 1 and most <= NAMES, "test", self.test, f"with the distractors no more than {NAMES} names")

  @property
  def loss(self):
    return functools.partial(answer_loss, rows=True)

  @property
  def chance(self) -> float:
    """Nobody guesses a whole solution."""
    return 0.0


class MathRows:
  """Rows of one problem and its solution, padded; loss and accuracy on the solution alone."""

  def __init__(self, cfg: MathConfig, vocab: int, length: int, seed: int, split: str):
    needed = cfg.modulus + NAMES + len(SYMBOLS)
    check(needed <= vocab, "math.modulus", cfg.modulus, f"the task has {needed} tokens, and model.vocab is {vocab}")
    longest = longest_problem(max(cfg.train_most, cfg.test), cfg.distractors)
    check(longest <= length, "length", length, f"the longest problem has {longest} tokens; use that, or math.test less")
    self.cfg, self.vocab, self.length = cfg, vocab, length
    self.seed = (seed, ("train", "validation").index(split))
    self.train = split == "train"
    self.rows = TRAIN_ROWS if self.train else VALIDATION_ROWS
    words = [*range(cfg.modulus), *(f"x{i}" for i in range(NAMES)), *SYMBOLS]
    self.ids = {word: i for i, word in enumerate(words)}

  def __len__(self) -> int:
    return self.rows

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((*self.seed, i))
    least, most = (self.cfg.train_least, self.cfg.train_most) if self.train else (self.cfg.test,) * 2
    problem, solution = self.problem(rng, int(rng.integers(least, most + 1)))
    tokens = np.full(self.length, self.ids["."])
    tokens[: len(problem) + len(solution)] = [self.ids[word] for word in problem + solution]
    at = np.arange(self.length)
    # the prediction of the solution's first word is made at the problem's last
    return row(tokens, (at >= len(problem) - 1) & (at < len(problem) + len(solution) - 1))

  def __repr__(self) -> str:
    return f"MathRows({self.cfg}, {self.vocab}, {self.length}, {self.seed})"

  def problem(self, rng: np.random.Generator, needed: int) -> tuple[list, list]:
    """The words of a problem that needs `needed` definitions, and of its solution."""
    while True:
      definitions = self._definitions(rng, needed + self.cfg.distractors)
      for asked in rng.permutation(list(definitions)).tolist():
        if len(order := _order(definitions, asked)) == needed:
          break
      else:
        continue  # nothing in it needs just so many
      break
    words = []
    for name in rng.permutation(list(definitions)).tolist():
      words += [name, "=", *definitions[name], ";"]
    values, solution = {}, []
    for name in order:
      left, *rest = (values.get(word, word) for word in definitions[name])
      values[name] = (
        {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[rest[0]](left, rest[1]) % self.cfg.modulus
        if rest
        else left
      )
      solution += [name, "=", left, *rest, *(["=", values[name]] if rest else []), ";"]
    return [*words, "?", asked], [*solution, "!", values[asked]]

  def _definitions(self, rng: np.random.Generator, count: int) -> dict[str, tuple]:
    """{name: (number,) or (operand, operator, operand)}; an operand is a number or a name before, unused ones first."""
    out: dict[str, tuple] = {}
    unused: list[str] = []
    for name in (f"x{i}" for i in rng.permutation(NAMES)[:count]):
      if not out or rng.random() < 0.25:
        out[name] = (int(rng.integers(self.cfg.modulus)),)
      else:
        left = unused[int(rng.integers(len(unused)))] if unused else str(rng.choice(list(out)))
        others = [n for n in out if n != left]
        number = not others or rng.random() < 0.3
        right = int(rng.integers(self.cfg.modulus)) if number else str(rng.choice(others))
        operands = (left, right) if rng.random() < 0.5 else (right, left)
        out[name] = (operands[0], str(rng.choice(("+", "-", "*"))), operands[1])
        unused = [n for n in unused if n not in operands]
      unused.append(name)
    return out


def _order(definitions: dict[str, tuple], asked: str) -> list[str]:
  """What is needed for `asked`, each after its operands, the left one first."""
  done: dict[str, None] = {}

  def visit(name):
    if name not in done:
      for operand in definitions[name][::2]:
        if isinstance(operand, str):
          visit(operand)
      done[name] = None

  visit(asked)
  return list(done)


def longest_problem(needed: int, distractors: int) -> int:
  """Tokens: a definition takes up to 6, a step up to 8, question and answer 2 each."""
  return 6 * (needed + distractors) + 2 + 8 * needed + 2
