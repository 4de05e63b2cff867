"""Short strings and a small policy that writes them token by token, whose parameters all strings share.

The state before a token is tanh of the sum of a start vector and the vectors of the tokens so far; the next token's
logits are linear in it. Too small for most preferences over whole strings, and gradients of log-probabilities overlap.
"""

import itertools

import jax
from jax import numpy as jnp
import numpy as np


def all_strings(vocab: int, length: int) -> np.ndarray:
  """int32 [vocab^length, length], the last token the fastest."""
  return np.array(list(itertools.product(range(vocab), repeat=length)), np.int32)


def start(rng: np.random.Generator, count: int, vocab: int, width: int) -> np.ndarray:
  """`count` policies [count, 2 vocab + 1, width]: the start vector, a vector a token, and a row of logits a token."""
  return rng.normal(size=(count, 2 * vocab + 1, width))


def log_prob(theta: jax.Array, string: jax.Array) -> jax.Array:
  """log pi of one string int [length], a scalar, from theta [2 vocab + 1, width]."""
  first, vectors, rows = jnp.split(theta, [1, 1 + theta.shape[0] // 2])
  states = jnp.tanh(jnp.cumsum(jnp.concatenate([first, vectors[string[:-1]]]), axis=0))
  logits = jax.nn.log_softmax(states @ rows.T)
  return jnp.sum(jnp.take_along_axis(logits, string[:, None], axis=1))


def log_policy(theta: jax.Array, strings: jax.Array) -> jax.Array:
  """log pi of many strings int [n, length], [n]."""
  return jax.vmap(log_prob, (None, 0))(theta, strings)
