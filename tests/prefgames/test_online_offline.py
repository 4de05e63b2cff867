"""Strings that learn online and offline, and pairs whose gradients hang together, under the loop."""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from experiments.prefgames import entanglement, online_offline
from experiments.prefgames.entanglement import PairConfig
from experiments.prefgames.experiment import Config, build
from experiments.prefgames.online_offline import StringsConfig
from experiments.prefgames.strings import all_strings, log_policy, start
from research.fit import abstract_state, fresh_state, jit_step
from research.mesh import MeshConfig, to_devices
from research.preference import games, losses, matrices


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def trained(steps, devices=1, rows=4, **settings):
  """(theta, the evaluations) after some steps of one seed."""
  tx = dataclasses.replace(Config().tx, warmup=0)
  cfg = Config(batch=rows, steps=steps, tx=tx, mesh=MeshConfig(data=devices), **settings)
  mesh = jax.make_mesh((1, devices, 1), ("replica", "data", "model"), devices=jax.devices()[:devices])
  with jax.set_mesh(mesh):
    exp = build(cfg)
    abstract = abstract_state(exp)
    state, step = fresh_state(exp, abstract, 0), jit_step(exp, cfg, abstract)
    data = to_devices(next(iter(exp.data("train"))))
    for _ in range(steps):
      state, _ = jax.block_until_ready(step(state, data))
    (found,) = (f(state.model) for f in exp.evals.values())
    return np.asarray(state.model.theta[...]), found


def test_a_policy_of_strings_is_a_distribution_over_them():
  theta = start(np.random.default_rng(0), 1, 3, 2)[0]
  assert float(jnp.exp(log_policy(theta, all_strings(3, 3))).sum()) == pytest.approx(1)


def test_a_step_is_gradient_descent_on_ipos_loss():
  strings = StringsConfig(vocab=2, length=2, width=3, data="offline_proxy", rate=0.2)
  rows = online_offline.worlds(0, 1, 2, 2, 3, 50)
  taught = online_offline.learnt_from(strings, rows, 1)
  tau, theta, reference = 0.1, rows["reference"][0] + 0.1, rows["reference"][0]
  labels, weights = taught["labels"][0], taught["weights"][0, 0]
  assert weights.sum() == pytest.approx(1)
  i, j = np.divmod(np.arange(16), 4)

  def loss(theta):
    logp, ref = (log_policy(x, all_strings(2, 2)) for x in (theta, reference))
    pair = lambda x: jnp.stack([x[i], x[j]], axis=1)[..., None]
    return jnp.sum(weights[i, j] * losses.ipo(pair(logp), pair(ref), labels[i, j], jnp.ones((16, 2, 1)), b=tau))

  moved = online_offline.update(strings, tau, theta, reference, labels, weights)
  np.testing.assert_allclose(moved, theta - 0.2 * tau / 2 * jax.grad(loss)(theta), atol=1e-12)


def test_the_proxy_knows_what_the_golden_labels_said_and_is_not_the_golden_preference():
  rows = online_offline.worlds(0, 8, 4, 3, 4, 300)
  for golden, proxy in zip(rows["golden"], rows["proxy"], strict=True):
    matrices.checked(golden)
    matrices.checked(proxy)
  apart = np.abs(rows["golden"] - rows["proxy"]).mean()
  assert 0.05 < apart < np.abs(rows["golden"] - 0.5).mean() + 0.1
  assert np.corrcoef(rows["golden"].ravel(), rows["proxy"].ravel())[0, 1] > 0.3
  wins = np.zeros((3, 3))
  wins[0, 1] = wins[1, 0] = 50  # even, and a string that nobody has seen
  np.testing.assert_allclose(online_offline.fitted_scores(wins), 0, atol=1e-12)


def test_what_was_shown_is_the_mean_of_the_online_runs_pairs():
  strings = StringsConfig(vocab=2, length=2, width=3, taus=(0.3, 0.1), data="shuffled")
  rows = online_offline.worlds(0, 2, 2, 2, 3, 50)
  shown = online_offline.learnt_from(strings, rows, 3)["weights"]
  assert shown.shape == (2, 2, 4, 4)
  np.testing.assert_allclose(shown.sum((-1, -2)), 1)
  online = dataclasses.replace(strings, data="online")
  theta, seen = rows["reference"][1], 0
  for _ in range(3):
    pi = np.exp(log_policy(theta, all_strings(2, 2)))
    seen = seen + np.outer(pi, pi) / 3
    theta = online_offline.update(online, 0.1, theta, rows["reference"][1], rows["proxy"][1], None)
  np.testing.assert_allclose(shown[1, 1], seen, atol=1e-12)


@pytest.mark.parametrize("task", ["strings", "pair"])
def test_four_devices_share_the_rows_out_and_change_nothing(task):
  settings = {"strings": StringsConfig(vocab=2, length=2, taus=(0.1,), updates=3)}
  settings = settings if task == "strings" else {"pair": PairConfig(vocab=3, length=3, updates=3)}
  both = [trained(2, devices=d, task=task, **settings) for d in (1, 4)]
  np.testing.assert_allclose(both[1][0], both[0][0], atol=1e-13)
  assert both[1][1] == pytest.approx(both[0][1], rel=1e-9)


def test_all_learn_to_win_and_offline_learning_classifies_better():
  settings = {"taus": (0.03,), "updates": 100}
  found = {
    name: trained(1, task="strings", rows=8, strings=StringsConfig(data=name, **settings))[1]
    for name in ("online", "offline")
  }
  assert min(f["win_rate@0.03"] for f in found.values()) > 0.65
  assert found["offline"]["classified@0.03"] > found["online"]["classified@0.03"] + 0.03


@pytest.mark.parametrize("loss", ["dpo", "ipo", "normalised"])
def test_inner_products_of_gradients_say_which_way_a_small_step_moves_both(loss):
  pair = PairConfig(loss=loss, rate=1e-6)
  rows = entanglement.pairs(0, 64, pair.vocab, pair.length, pair.width, 1)
  found = entanglement._compiled(pair)(rows["reference"], rows)
  np.testing.assert_allclose(
    found["moved"], found["predicted"], rtol=2e-2, atol=1e-3 * np.abs(found["predicted"]).max()
  )
  wrong = (found["predicted"][:, 0] < 0) | (found["predicted"][:, 1] > 0)
  # <g_w, g_l> against both squared norms, by themselves
  g = jax.vmap(jax.jacobian(lambda theta, strings: log_policy(theta, strings)))(rows["reference"], rows["strings"])
  g = np.asarray(g).reshape(64, 2, -1)
  inner = np.sum(g[:, 0] * g[:, 1], axis=-1)
  entangled = inner > np.minimum(np.sum(g[:, 0] ** 2, -1), np.sum(g[:, 1] ** 2, -1))
  np.testing.assert_array_equal(wrong, entangled if loss != "normalised" else np.zeros(64, bool))
  assert 0.2 < entangled.mean() < 0.7


def test_strings_of_a_pair_differ_in_as_many_tokens_as_asked():
  for k in (1, 5, 12):
    strings = entanglement.pairs(0, 20, 8, 12, 8, k)["strings"]
    assert (np.sum(strings[:, 0] != strings[:, 1], axis=-1) == k).all()


def test_the_kl_and_the_golden_win_rate_are_the_games():
  strings = StringsConfig(vocab=2, length=2, width=3, taus=(0.1,))
  rows = online_offline.worlds(0, 1, 2, 2, 3, 50)
  theta = rows["reference"][:, None] + 0.3 * np.random.default_rng(1).normal(size=(1, 1, 5, 3))
  found = online_offline._measures(strings, theta, rows)
  pi, r = (np.exp(log_policy(x, all_strings(2, 2))) for x in (theta[0, 0], rows["reference"][0]))
  assert float(found["win_rate"][0, 0]) == pytest.approx(pi @ rows["golden"][0] @ r)
  assert float(found["kl"][0, 0]) == pytest.approx(float(games.kl(jnp.log(pi), jnp.log(r))))
