"""Metrics as ratios of sums: exact over micro-batches, shards and validation batches."""

import dataclasses
import functools

import jax
from jax import numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=["total", "weight"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Mean:
  """A weighted mean that is still two sums, so that means of parts add up to the mean of the whole.

  total: float32 scalar, sum of weight * value. weight: float32 scalar.
  """

  total: jax.Array
  weight: jax.Array

  def __add__(self, other: "Mean") -> "Mean":
    return Mean(self.total + other.total, self.weight + other.weight)

  @property
  def value(self) -> jax.Array:
    """The mean; 0 where there is no weight."""
    return self.total / jnp.maximum(self.weight, 1e-9)


def add(a: dict[str, Mean], b: dict[str, Mean]) -> dict[str, Mean]:
  """The sums of two dicts of means, key by key."""
  return {name: a[name] + b[name] for name in a}
