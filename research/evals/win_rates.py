"""How often one model's responses beat another's, by a judge, with the error of it."""

from collections.abc import Iterable, Mapping
import functools
import itertools
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from research.generation import Sampling
from research.mesh import to_devices
from research.models.decoder import Decoder
from research.preference.oracles import Oracle
from research.preference.samplers import Policy, Responses, draw

Batch = Mapping[str, Any]


def responses(
  model: Decoder,
  batches: Iterable[Batch],
  *,
  each: int,
  tokens: int,
  stop: tuple[int, ...],
  sampling: Sampling,
  seed: int = 0,
  player: int = 0,
) -> list[list[Responses]]:
  """`each` responses to every prompt, [batch][response]; what a model gets depends on seed, player and place alone.

  player: a number of its own for each model that is to meet others. Of the same random numbers two models make
  answers that hang together, and where preferences go in circles that moves their win rate, at times by points.
  batches: prompts int32 [rows, length], padded on the left, and lengths int32 [rows], this process's rows of numpy
  arrays as a loader has them.
  """
  make = jax.jit(functools.partial(draw, Policy(sampling), tokens=tokens, stop=stop))
  out = []
  start = jax.random.fold_in(jax.random.key(seed), player)
  for i, batch in enumerate(batches):
    key = jax.random.fold_in(start, i)
    rows = to_devices({name: batch[name] for name in ("prompts", "lengths")})
    one = lambda j, rows=rows, key=key: make(model, model, rows["prompts"], rows["lengths"], jax.random.fold_in(key, j))
    out.append([jax.block_until_ready(one(j)) for j in range(each)])
  return out


def matrix(
  oracle: Oracle, batches: Iterable[Batch], made: Mapping[str, list[list[Responses]]]
) -> dict[tuple[str, str], tuple[float, float]]:
  """{(a, b): (how often a's responses beat b's, its standard error)} for all ordered pairs of models.

  The j-th response of one meets the j-th of the other. A prompt is one observation, the mean over its responses:
  those to one prompt are not independent. So the error is the deviation over prompts, over the root of their number,
  and holds for new prompts and responses; not for another judge. Rows of weight 0 do not count.
  """
  batches = [to_devices(batch) for batch in batches]
  out = {(a, a): (0.5, 0.0) for a in made}
  for a, b in itertools.combinations(made, 2):
    total = np.zeros(3)
    for batch, first, second in zip(batches, made[a], made[b], strict=True):
      total += np.asarray(jax.block_until_ready(_sums(oracle, batch, first, second)), np.float64)
    n, rate = total[0], total[1] / total[0]
    variance = max(total[2] / n - rate**2, 0.0) * n / max(n - 1, 1)
    error = float(np.sqrt(variance / n))
    out[a, b], out[b, a] = (float(rate), error), (float(1 - rate), error)
  return out


@jax.jit
def _sums(oracle: Oracle, batch: Batch, first: list[Responses], second: list[Responses]) -> jax.Array:
  """Over prompts: their number, the sum of their rates, and of the squares."""
  p = sum(oracle.prob(batch, y, y2) for y, y2 in zip(first, second, strict=True)) / len(first)
  weights = batch["weights"]
  return jnp.stack([jnp.sum(weights), jnp.sum(weights * p), jnp.sum(weights * p * p)])
