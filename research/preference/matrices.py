"""Preference matrices: P[i, j] is the probability that response i beats response j, so P + P^T = 1.

Rows and columns are the finite set of responses; matrices may be stacked along leading axes.
"""

import numpy as np

from research.errors import check

_TOLERANCE = 1e-6  # float32 tables and judges are exact to about 1e-7


def checked(preferences: np.ndarray, field: str = "preferences") -> np.ndarray:
  """`preferences` [..., n, n] in float64. Raises UserError naming the first entry that breaks the contract."""
  p = np.asarray(preferences, np.float64)
  check(p.ndim >= 2 and p.shape[-1] == p.shape[-2], field, f"shape {p.shape}", "must be square, [..., n, n]")
  # written so that NaN fails too
  _entry(~((p >= 0) & (p <= 1)), p, field, "must be a probability, in [0, 1]")
  both = p + np.swapaxes(p, -1, -2)
  fix = "must be 1 minus the entry across the diagonal (1/2 on it): P + P^T = 1"
  _entry(np.abs(both - 1) > _TOLERANCE, p, field, fix)
  return p


def checked_policy(policy: np.ndarray, field: str = "reference") -> np.ndarray:
  """The log-probabilities of `policy` [..., n], given as probabilities. Raises UserError naming the entry.

  Every response needs mass: one that a reference never plays has an infinite log-ratio.
  """
  p = np.asarray(policy, np.float64)
  _entry(~(p > 0), p, field, "must be positive: every response needs some mass")
  total = p.sum(-1)
  off = np.abs(total - 1) > _TOLERANCE
  check(not off.any(), field, f"sums to {total[off].flat[0] if off.any() else 1:.6g}", "probabilities must sum to 1")
  return np.log(p / total[..., None])


def _entry(wrong: np.ndarray, values: np.ndarray, field: str, fix: str) -> None:
  if wrong.any():
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    check(False, f"{field}[{', '.join(map(str, at))}]", f"{values[at]:.6g}", fix)


def uniform(rng: np.random.Generator, games: int, n: int) -> np.ndarray:
  """[games, n, n]: independent uniform preferences, as in the tabular experiments of EGPO (arXiv 2503.08942)."""
  lower = np.tril(rng.random((games, n, n)), -1)
  mirrored = np.triu(1 - np.swapaxes(lower, -1, -2), 1)
  return lower + mirrored + np.eye(n) / 2


def bradley_terry(scores: np.ndarray) -> np.ndarray:
  """Transitive preferences [..., n, n] from scores [..., n]: sigmoid of the difference (Bradley and Terry, 1952)."""
  s = np.asarray(scores, np.float64)
  return 1 / (1 + np.exp(s[..., None, :] - s[..., :, None]))


def cyclic(n: int, win: float = 1.0) -> np.ndarray:
  """[n, n] in which each response beats the one before it (and loses to the one after) with probability `win`.

  n = 3 is rock-paper-scissors; for more, pairs further apart are even. Raises UserError.
  """
  check(n >= 3, "n", n, "a cycle needs at least 3 responses")
  check(0 <= win <= 1, "win", win, "must be a probability, in [0, 1]")
  p = np.full((n, n), 0.5)
  at = np.arange(n)
  p[at, at - 1], p[at - 1, at] = win, 1 - win
  return p


def population(annotators: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """[n, n] of a random annotator: `annotators` [k, n, n] drawn with `weights` [k].

  Transitive annotators can make an intransitive population (Condorcet's paradox). Raises UserError.
  """
  w = np.exp(checked_policy(weights, "weights"))
  return np.einsum("k,kij->ij", w, checked(annotators, "annotators"))
