"""Several sources of rows as one, in proportions that hold over any window."""

from collections.abc import Sequence
from fractions import Fraction
import math


class Mixture:
  """Rows of all `parts`, one part after the other: what validation reads.

  In training `research.data.batches` interleaves them by `weights` instead, each part
  shuffled and repeated on its own.
  """

  def __init__(self, parts: Sequence, weights: Sequence[float]):
    self.parts, self.shares = tuple(parts), shares(weights)
    self.positions = sum(part.positions for part in parts)

  def __len__(self) -> int:
    return sum(len(part) for part in self.parts)

  def __getitem__(self, i: int):
    if not 0 <= i < len(self):
      raise IndexError(f"row {i} of {len(self)}")
    for part in self.parts:
      if i < len(part):
        return part[i]
      i -= len(part)


def shares(weights: Sequence[float]) -> tuple[int, ...]:
  """Whole numbers in exactly the proportions of the weights as written: (0.7, 0.3) -> (7, 3)."""
  exact = [Fraction(repr(float(w))) for w in weights]
  scale = math.lcm(*(f.denominator for f in exact))
  whole = [int(f * scale) for f in exact]
  return tuple(n // math.gcd(*whole) for n in whole)


def interleave(k: int, shares: Sequence[int]) -> tuple[int, int]:
  """(part, index in the part) of row `k` of the endless order.

  Of the first k rows, floor(k * rest) are not for the first part, and so on with the
  parts left. Each floor is off by less than one row in any window, and later ones
  scale what came before down: the count of a part in any n rows differs from
  n * share / sum(shares) by less than the number of parts.
  """
  rest = sum(shares)
  before, after = k, k + 1  # rows left to the parts not yet asked, without and with row k
  for part, share in enumerate(shares):
    left, left_after = before * (rest - share) // rest, after * (rest - share) // rest
    if left == left_after:
      return part, before - left
    before, after, rest = left, left_after, rest - share
  raise AssertionError("the last part takes all that is left")
