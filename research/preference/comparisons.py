"""Accumulated comparisons in a finite set of responses, and the objectives of DPO and XPO on them.

XPO (arXiv 2405.21046) minimises over all comparisons so far, not over the last batch:

  alpha sum_D log pi(y2) - sum_D log sigmoid(b d(winner) - b d(loser)),  d = log pi - log r

with y of the policy and y2 of a sampler, the reference. The bonus is PLUS alpha log pi(y2) in what is minimised: it
moves mass away from what the sampler shows anyhow. With the sign turned a policy never explores.
"""

import dataclasses
import functools

import jax
from jax import numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=["wins", "second"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Comparisons:
  """wins [n, n]: how often i beat j. second [n]: how often each response was the sampler's. Counts, or weights."""

  wins: jax.Array
  second: jax.Array

  def __add__(self, other: "Comparisons") -> "Comparisons":
    return Comparisons(self.wins + other.wins, self.second + other.second)

  @property
  def count(self) -> jax.Array:
    """Comparisons held, a scalar."""
    return jnp.sum(self.wins)


def empty(n: int, dtype: jnp.dtype = jnp.float32) -> Comparisons:
  """No comparison yet."""
  return Comparisons(jnp.zeros((n, n), dtype), jnp.zeros(n, dtype))


def observed(n: int, y: jax.Array, y2: jax.Array, wins: jax.Array) -> Comparisons:
  """Of pairs y, y2 int [m]; wins [m] is 1 where y beat y2 and 0 where it lost, or the probability of it."""
  counts = jnp.zeros((n, n), wins.dtype).at[y, y2].add(wins).at[y2, y].add(1 - wins)
  return Comparisons(counts, jnp.zeros(n, wins.dtype).at[y2].add(1))


def expected(preferences: jax.Array, log_policy: jax.Array, log_sampler: jax.Array) -> Comparisons:
  """One comparison in expectation: y of the policy, y2 of the sampler, P [n, n]."""
  pairs = jnp.exp(log_policy[:, None] + log_sampler[None, :])
  return Comparisons(pairs * preferences + (pairs * (1 - preferences)).T, jnp.exp(log_sampler))


def dpo_objective(log_policy: jax.Array, log_reference: jax.Array, data: Comparisons, b: float) -> jax.Array:
  """- sum_D log sigmoid(b d(winner) - b d(loser)), a scalar (a sum; divide by `data.count` for the mean)."""
  d = log_policy - log_reference
  return -jnp.sum(data.wins * jax.nn.log_sigmoid(b * (d[:, None] - d[None, :])))


def xpo_objective(
  log_policy: jax.Array, log_reference: jax.Array, data: Comparisons, b: float, alpha: float
) -> jax.Array:
  """alpha sum_D log pi(y2) + `dpo_objective`, a scalar to be minimised; vmap over the policies of a finite class."""
  return alpha * jnp.sum(data.second * log_policy) + dpo_objective(log_policy, log_reference, data, b)
