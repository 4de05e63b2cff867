"""The games of the tables, drawn from a seed: rows of data, one game each.

A row holds preferences [n, n], log_reference [n] and log_equilibrium [n], in float64.
"""

import functools

import numpy as np

from research.errors import check
from research.preference import games, matrices

TILT = 3.0  # the most a tilted reference's logits differ by


def uniform(rng: np.random.Generator, count: int, n: int) -> tuple[np.ndarray, np.ndarray]:
  """EGPO's tables: independent uniform preferences, references of standard normal logits."""
  return matrices.uniform(rng, count, n), rng.normal(size=(count, n))


def transitive(rng: np.random.Generator, count: int, n: int) -> tuple[np.ndarray, np.ndarray]:
  """The control: Bradley-Terry preferences of standard normal scores, the same references."""
  return matrices.bradley_terry(rng.normal(size=(count, n))), rng.normal(size=(count, n))


def cycle(rng: np.random.Generator, count: int, n: int) -> tuple[np.ndarray, np.ndarray]:
  """Each response beats the one before it with probability 0.9; references tilted by up to `TILT`.

  A uniform reference is the equilibrium of a cycle, and nothing would move.
  """
  return np.broadcast_to(matrices.cyclic(n, 0.9), (count, n, n)), rng.uniform(0, TILT, (count, n))


KINDS = {"uniform": uniform, "transitive": transitive, "cycle": cycle}


def draw(kinds: tuple[str, ...], seed: int, count: int, n: int, b: float) -> dict[str, np.ndarray]:
  """`count` games of n responses, equally many of each kind, with the equilibrium of each at `b`. Raises UserError."""
  check(count % len(kinds) == 0, "batch", count, f"must be a multiple of {len(kinds)}: as many games of each kind")
  check(n >= 3, "length", n, "games have at least 3 responses")
  parts = [_draw(kind, seed, count // len(kinds), n, b) for kind in kinds]
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@functools.lru_cache(maxsize=64)
def _draw(kind: str, seed: int, count: int, n: int, b: float) -> dict[str, np.ndarray]:
  rng = np.random.default_rng((list(KINDS).index(kind), seed))
  preferences, logits = KINDS[kind](rng, count, n)
  log_reference = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
  solved = games.equilibrium(preferences, log_reference, b)
  return {"preferences": preferences, "log_reference": log_reference, "log_equilibrium": solved}
