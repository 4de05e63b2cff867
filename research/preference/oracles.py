"""Preference oracles, all of one interface: prob(prompt, y, y2), the probability that y beats y2.

prompt, y and y2 hold a batch along their leading axis: ids of a finite set, or whatever else an oracle's
functions understand, such as `samplers.Responses`. The result is [batch], in [0, 1]. There is no score at the
interface: a preference that goes in circles has none. Every oracle keeps P(y, y2) + P(y2, y) = 1.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Protocol

import jax
from jax import P
from jax import numpy as jnp
import numpy as np

from research.errors import check
from research.kernels.dispatch import place
from research.preference import matrices

_TOLERANCE = 1e-5  # of `checked`: float32, and a sigmoid or two


class Oracle(Protocol):
  """What answers for people."""

  def prob(self, prompt: Any, y: Any, y2: Any) -> jax.Array:
    """[batch]: how probably each y is preferred to its y2."""


def _tree(data: list[str], meta: list[str]):
  """A frozen dataclass that is a pytree: an oracle goes into a compiled program as an argument."""
  return lambda cls: jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls), data, meta)


@_tree(["preferences"], [])
class Table:
  """P [n, n], or [prompts, n, n], looked up; prompts and responses are int32 [batch]. Make it with `table`."""

  preferences: jax.Array

  def prob(self, prompt: jax.Array, y: jax.Array, y2: jax.Array) -> jax.Array:
    """P[y, y2], or P[prompt, y, y2]."""
    return self.preferences[y, y2] if self.preferences.ndim == 2 else self.preferences[prompt, y, y2]


def table(preferences: np.ndarray) -> Table:
  """The oracle of a matrix, or of one a prompt. Raises UserError naming the entry that breaks the contract."""
  return Table(jnp.asarray(matrices.checked(preferences)))


@_tree([], ["score"])
class BradleyTerry:
  """sigmoid(score(y) - score(y2)) (Bradley and Terry, 1952): always transitive. score: (prompt, y) -> [batch]."""

  score: Callable[[Any, Any], jax.Array]

  def prob(self, prompt: Any, y: Any, y2: Any) -> jax.Array:
    """In closed form of the two scores."""
    return jax.nn.sigmoid(self.score(prompt, y) - self.score(prompt, y2))


@_tree(["wins", "strength"], ["features", "quality"])
class Cyclic:
  """sigmoid(strength f(y)' C f(y2) + quality(y) - quality(y2)), C skew: intransitive by `strength`.

  features: (prompt, y) -> [batch, classes]. wins: C [classes, classes], C[i, j] > 0 where i beats j.
  quality: (prompt, y) -> [batch], the transitive part; None: 0. Make it with `cyclic`.
  """

  wins: jax.Array
  strength: Any
  features: Callable[[Any, Any], jax.Array]
  quality: Callable[[Any, Any], jax.Array] | None = None

  def prob(self, prompt: Any, y: Any, y2: Any) -> jax.Array:
    """Of the two responses' features and qualities."""
    f, f2 = self.features(prompt, y), self.features(prompt, y2)
    z = self.strength * jnp.einsum("bi,ij,bj->b", f, self.wins, f2)
    if self.quality is not None:
      z += self.quality(prompt, y) - self.quality(prompt, y2)
    return jax.nn.sigmoid(z)


def cyclic(wins: np.ndarray, strength: float, features: Callable, quality: Callable | None = None) -> Cyclic:
  """A `Cyclic` oracle. Raises UserError naming the entry of `wins` that is not minus the one across the diagonal."""
  c = np.asarray(wins, np.float64)
  check(c.ndim == 2 and c.shape[0] == c.shape[1], "wins", f"shape {c.shape}", "must be square")
  off = np.argwhere(~(np.abs(c + c.T) < 1e-6))
  at = tuple(int(i) for i in off[0]) if len(off) else (0, 0)
  fix = "must be minus the entry across the diagonal (0 on it)"
  check(not len(off), f"wins[{at[0]}, {at[1]}]", f"{c[at]:.6g}", fix)
  return Cyclic(jnp.asarray(c, jnp.float32), strength, features, quality)


@_tree(["annotators", "weights"], [])
class Population:
  """A random annotator's preference: `annotators`, a tuple of oracles, drawn with `weights` [k].

  Transitive annotators can make an intransitive population. Make it with `population`.
  """

  annotators: tuple[Any, ...]
  weights: jax.Array

  def prob(self, prompt: Any, y: Any, y2: Any) -> jax.Array:
    """The weighted mean over annotators."""
    return sum(w * oracle.prob(prompt, y, y2) for w, oracle in zip(self.weights, self.annotators, strict=True))


def population(annotators: list[Oracle], weights: list[float]) -> Population:
  """A `Population`. Raises UserError where weights are not positive, do not sum to 1, or are not one an annotator."""
  check(len(annotators) == len(weights), "weights", len(weights), f"give one for each of {len(annotators)} annotators")
  return Population(tuple(annotators), jnp.asarray(np.exp(matrices.checked_policy(weights, "weights")), jnp.float32))


@_tree(["model"], ["logit"])
class Learned:
  """A pairwise model asked in both orders: the mean of s(logit(y, y2)) and 1 - s(logit(y2, y)).

  logit: (model, prompt, y, y2) -> [batch] log-odds that the first is better. Whatever the model prefers by place
  alone falls out, and the contract holds by construction: the mean of a judge whose order is randomised, as in EGPO.
  """

  model: Any
  logit: Callable[[Any, Any, Any, Any], jax.Array]

  def prob(self, prompt: Any, y: Any, y2: Any) -> jax.Array:
    """Of both orders."""
    first = jax.nn.sigmoid(self.logit(self.model, prompt, y, y2))
    second = jax.nn.sigmoid(-self.logit(self.model, prompt, y2, y))
    return (first + second) / 2


def pairwise(oracle: Oracle, prompt: Any, responses: Any, k: int) -> jax.Array:
  """P [batch, k, k] among k responses a prompt; `responses` has axes [batch, k, ...]. k^2 queries."""
  one = lambda i: jax.tree.map(lambda x: x[:, i], responses)
  rows = [jnp.stack([oracle.prob(prompt, one(i), one(j)) for j in range(k)], axis=1) for i in range(k)]
  return jnp.stack(rows, axis=1)


def checked(oracle: Oracle, prompt: Any, y: Any, y2: Any) -> None:
  """Asks the oracle in both orders, and of y itself. Raises UserError naming the first row that breaks the contract."""
  ask = jax.jit(lambda y, y2: place(oracle.prob(prompt, y, y2), P()))  # whole, on every process
  there, back, same = (np.asarray(p, np.float64) for p in (ask(y, y2), ask(y2, y), ask(y, y)))
  _rows(~((there >= 0) & (there <= 1)), there, "must be a probability, in [0, 1]")
  _rows(~(np.abs(there + back - 1) <= _TOLERANCE), there, "and the other order must sum to 1")
  _rows(~(np.abs(same - 0.5) <= _TOLERANCE), same, "a response against itself must be 0.5")


def _rows(wrong: np.ndarray, values: np.ndarray, fix: str) -> None:
  if wrong.any():
    at = int(np.argmax(wrong))
    check(False, f"oracle[{at}]", f"{values[at]:.6g}", fix)
