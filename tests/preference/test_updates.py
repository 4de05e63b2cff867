"""Updates: what an extragradient step forgets, what optimism keeps, and that they are the tabular ones."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from research.fit import accumulated
from research.metrics import Mean
from research.preference import matrices, updates
from research.preference.tabular import METHODS, Game, start

KEY = jax.random.key(0)


def quadratic(params, opponent, key):
  """Gradients that no opponent changes."""
  return jax.tree.map(lambda x: 2 * x + 1, params), None


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, 0.9))])
def test_a_half_step_leaves_no_trace_in_parameters_or_optimiser(tx):
  params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.3)}
  opt = tx.init(params)
  _, opt, _ = updates.plain(quadratic, tx, params, opt, KEY)  # moments that are not zero
  expected = updates.plain(quadratic, tx, params, opt, KEY)
  got = updates.extragradient(quadratic, tx, params, opt, KEY)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("update", "row"), [("plain", "online_ipo_uniform"), ("extragradient", "egpo")])
def test_updates_by_a_loss_are_the_tabular_ones(update, row):
  rng = np.random.default_rng(0)
  n, b, eta = 4, 0.1, 0.6
  with jax.enable_x64(True):
    log_r = jax.nn.log_softmax(jnp.asarray(rng.normal(size=n)))
    game = Game(jnp.asarray(matrices.uniform(rng, 1, n)[0]), log_r, jnp.asarray(b))

    def loss(theta, opponent, key):
      d, q = jax.nn.log_softmax(theta) - log_r, game.win_rates(opponent)
      errors = (d[:, None] - d[None, :]) - (q[:, None] - q[None, :]) / b
      return {"loss": Mean(jnp.sum(errors**2), jnp.asarray(float(n * n)))}

    gradient = lambda params, opponent, key: accumulated(loss, params, opponent, key, 1)

    tx = optax.sgd(eta * b * n / 4)
    theta, state, opt = log_r - log_r.mean(), start(log_r), tx.init(log_r)
    step = jax.jit(functools.partial(updates.UPDATES[update], gradient, tx))
    for _ in range(3):
      theta, opt, means = step(theta, opt, KEY)
      state = METHODS[row](game, state, eta)
      np.testing.assert_allclose(theta - theta.mean(), state.theta, atol=1e-12)
    assert float(means["loss"].value) > 0


def test_optimism_remembers_the_last_gradient_and_asks_once():
  asked = []

  def rotating(params, opponent, key):
    asked.append(opponent)
    return jnp.array([opponent[1], -opponent[0]]), None  # min-max of x y

  tx = updates.remembering(optax.sgd(0.3))
  params = jnp.array([1.0, 1.0])
  opt = tx.init(params)
  expected, last = np.array([1.0, 1.0]), np.zeros(2)
  for i in range(40):
    params, opt, _ = updates.optimistic(rotating, tx, params, opt, KEY)
    ahead = expected - 0.3 * last
    last = np.array([ahead[1], -ahead[0]])
    expected = expected - 0.3 * last
    np.testing.assert_allclose(params, expected, rtol=1e-4)
    assert len(asked) == i + 1
  assert np.linalg.norm(params) < 0.5  # where plain steps circle outwards
  plain, opt = jnp.array([1.0, 1.0]), optax.sgd(0.3).init(params)
  for _ in range(40):
    plain, opt, _ = updates.plain(rotating, optax.sgd(0.3), plain, opt, KEY)
  assert np.linalg.norm(plain) > 3
