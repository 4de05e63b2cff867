"""Updates of parameters whose gradient depends on an opponent that is a copy of them.

A gradient is a function (parameters, opponent's parameters, key) -> (gradients by the first, anything): the opponent
is played against, and sampled from, and gets no gradient. An update is a function
(gradient, tx, parameters, opt, key) -> (parameters, opt, what the last gradient came with), tx an optax transformation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

Gradient = Callable[[Any, Any, jax.Array], tuple[Any, Any]]


def plain(gradient: Gradient, tx: optax.GradientTransformation, params: Any, opt: Any, key: jax.Array):
  """One step against the parameters themselves."""
  grads, aux = gradient(params, params, key)
  return *_step(tx, grads, params, opt), aux


def extragradient(gradient: Gradient, tx: optax.GradientTransformation, params: Any, opt: Any, key: jax.Array):
  """A half step to an opponent, then the whole step from where the half step began, against it: two gradients.

  EGPO (arXiv 2503.08942), with the optimiser of the whole step for the half step too, as in its public code; its
  theory has plain SGD. Parameters and the optimiser's state of the half step are forgotten: stepping back by the
  negated gradient would undo it for plain SGD only.
  """
  first, second = jax.random.split(key)
  grads, _ = gradient(params, params, first)
  half, _ = _step(tx, grads, params, opt)
  grads, aux = gradient(params, half, second)
  return *_step(tx, grads, params, opt), aux


class Remembered(NamedTuple):
  """The state of `remembering(tx)`: tx's own, and the gradients that it saw last."""

  opt: Any
  last: Any


def remembering(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """`tx`, with a state that keeps the last gradients for `optimistic`."""

  def init(params):
    return Remembered(tx.init(params), jax.tree.map(jnp.zeros_like, params))

  def update(grads, state, params=None):
    updates, opt = tx.update(grads, state.opt, params)
    return updates, Remembered(opt, grads)

  return optax.GradientTransformation(init, update)


def optimistic(gradient: Gradient, tx: optax.GradientTransformation, params: Any, opt: Remembered, key: jax.Array):
  """One step against an opponent that is a step ahead by the last gradients: one gradient an update (Popov, 1980).

  tx: made by `remembering`. The first opponent is what zero gradients lead to.
  """
  ahead, _ = _step(tx, opt.last, params, opt)
  grads, aux = gradient(params, ahead, key)
  return *_step(tx, grads, params, opt), aux


UPDATES = {"plain": plain, "extragradient": extragradient, "optimistic": optimistic}


def _step(tx: optax.GradientTransformation, grads: Any, params: Any, opt: Any) -> tuple[Any, Any]:
  updates, opt = tx.update(grads, opt, params)
  return optax.apply_updates(params, updates), opt
