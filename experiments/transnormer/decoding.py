"""What a token costs to generate after a text of any length: time, and the memory of what is kept of the text.

On a CPU time is the processor's, of all threads together: other programs on the machine do not count.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
from jax import P
from jax import numpy as jnp

from research.kernels.dispatch import place, platform
from research.models.decoder import Decoder
from research.nn.attention import Cache

ROWS = 1


def after(model: Decoder, context: int, room: int) -> Any:
  """The cache of a row of `context` tokens, with room for `room` more. Call it under jit.

  What the keys and values are does not matter to what a step costs: they are zeros, but the
  cache says that they are there. A state has one size, after one token or many.
  """
  one = jnp.ones((ROWS, 1), jnp.int32)
  cache = model.prefill(one, one, jnp.zeros_like(one), context + room)[1]
  if not isinstance(cache, Cache):
    return cache
  length = jnp.full_like(cache.length, context)
  return dataclasses.replace(cache, length=length, segment_ids=jnp.ones_like(cache.segment_ids))


def step(model: Decoder, token: jax.Array, position: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
  """(the likeliest next token [rows, 1], the cache after `token` [rows, 1] at `position`)."""
  x, cache = model.extend(token, jnp.ones_like(token), jnp.full_like(token, position), cache)
  logits = place(model.unembed(x), P(None, None, None))
  return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache


def size(model: Decoder, context: int) -> int:
  """Bytes of the cache for `context` tokens."""
  cache = jax.eval_shape(functools.partial(after, model, context, 0))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


class Decoding:
  """Greedy decoding after `context` tokens; a call makes `tokens` more with a model and returns seconds a token."""

  def __init__(self, context: int, tokens: int):
    self.tokens = tokens
    self.fill = jax.jit(lambda model: after(model, context, tokens))

    def run(model, cache):
      def body(carry, i):
        return step(model, carry[0], context + i, carry[1]), carry[0]

      first = place(jnp.zeros((ROWS, 1), jnp.int32), P(None, None))
      (_, cache), made = jax.lax.scan(body, (first, cache), jnp.arange(tokens))
      return made, cache

    self.run = jax.jit(run, donate_argnums=1)

  def __call__(self, model: Decoder) -> float:
    cache = jax.block_until_ready(self.fill(model))
    clock = time.process_time if platform() == "cpu" else time.perf_counter
    start = clock()
    jax.block_until_ready(self.run(model, cache))
    return (clock() - start) / self.tokens
