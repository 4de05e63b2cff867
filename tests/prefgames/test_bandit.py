"""Exploration in a finite class: its policies, its running sums, and the first row of the construction."""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from experiments.prefgames import bandit
from experiments.prefgames.bandit import BanditConfig, hypotheses, shortfall, token_log_policy
from experiments.prefgames.experiment import Config, build
from research.fit import abstract_state, fresh_state, jit_step
from research.mesh import MeshConfig, to_devices
from research.preference import comparisons


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def learnt(steps: int, runs: int = 32, **settings):
  """(the model, the evaluations) after `steps` steps of one seed on one device."""
  tx = dataclasses.replace(Config().tx, warmup=0)
  cfg = Config(task="bandit", batch=runs, bandit=BanditConfig(**settings), tx=tx, mesh=MeshConfig(data=1))
  with jax.set_mesh(jax.make_mesh((1, 1, 1), ("replica", "data", "model"), devices=jax.devices()[:1])):
    exp = build(cfg)
    abstract = abstract_state(exp)
    state, step = fresh_state(exp, abstract, 0), jit_step(exp, cfg, abstract)
    rows = to_devices(next(iter(exp.data("train"))))
    for _ in range(steps):
      state, _ = jax.block_until_ready(step(state, rows))
    return state.model, exp.evals["runs"](state.model)


@pytest.mark.parametrize("kind", ["arms", "lock"])
def test_each_policy_of_the_class_is_the_best_of_its_hypothesis(kind):
  cfg = BanditConfig(kind=kind, size=3, bs=(0.1, 0.03))
  log_r, log_class = cfg.log_references(), cfg.log_class()
  np.testing.assert_allclose(np.exp(log_r).sum(-1), 1)
  np.testing.assert_allclose(log_class[:, 0], log_r)
  for i, b in enumerate(cfg.bs):
    for k, rewards in enumerate(hypotheses(cfg.responses)):
      value = lambda p, rewards=rewards, b=b, i=i: np.exp(p) @ rewards - b * np.exp(p) @ (p - log_r[i])
      off = [float(shortfall(p, log_r[i], rewards, b)) for p in log_class[i]]
      assert abs(off[k + 1]) < 1e-12
      np.testing.assert_allclose(off, [value(log_class[i, k + 1]) - value(p) for p in log_class[i]], atol=1e-12)


def test_the_rare_responses_have_the_constructions_mass():
  cfg = BanditConfig(size=8, bs=(0.03, 0.02))
  np.testing.assert_allclose(np.exp(cfg.log_references()[:, 1:]).sum(-1), np.exp(-1 / (8 * np.array(cfg.bs))))


def test_the_running_sums_are_xpos_objective_on_all_comparisons():
  cfg = BanditConfig(size=2, bs=(0.2,), alpha=0.3)
  log_r, log_class = (jnp.asarray(x[0]) for x in (cfg.log_references(), cfg.log_class()))
  rewards, b = jnp.asarray(hypotheses(3)[1]), jnp.asarray(0.2)
  learner = jax.tree.map(lambda x: x[0, 0], learnt(0, runs=1, size=2, bs=(0.2,))[0])
  data = comparisons.empty(3, jnp.float64)
  for i in range(30):
    key = jax.random.key(i)
    y, y2, won = bandit._label(cfg, log_class[learner.incumbent[...]], log_r, rewards, key)
    data = data + comparisons.observed(3, y[None], y2[None], won[None].astype(float))
    learner, _ = bandit._class_step(cfg, (b, log_r, log_class, log_class - log_r), learner, rewards, key)
    objective = [float(comparisons.xpo_objective(p, log_r, data, b, 0.3 * b)) for p in log_class]
    np.testing.assert_allclose(learner.losses[...], objective, atol=1e-9)
    assert objective[int(learner.incumbent[...])] <= min(objective) + 1e-8


def test_one_rare_response_keeps_online_dpo_waiting_and_xpo_not():
  bs = (0.03, 0.02)
  shared = {"steps": 10, "size": 1, "bs": bs, "updates": 200, "alpha": 0.1}
  _, dpo = learnt(algorithm="dpo_reference", **shared)
  _, xpo = learnt(algorithm="xpo", **shared)
  _, flipped = learnt(algorithm="xpo_flipped", **shared)
  for b in bs:
    wait = np.exp(1 / (8 * b))
    assert wait / 4 < dpo[f"comparisons@{b:g}"] < 4 * wait
    assert xpo[f"comparisons@{b:g}"] < 20
    assert xpo[f"succeeded@{b:g}"] == 1
    assert flipped[f"succeeded@{b:g}"] < 0.3


def test_prefixes_start_as_the_reference_and_give_a_distribution():
  cfg = BanditConfig(kind="lock", size=4, policies="tokens", bs=(0.02,))
  start = bandit._start(cfg, 1)[0, 0]
  np.testing.assert_allclose(token_log_policy(start), cfg.log_references()[0], atol=1e-12)
  any_logits = jax.random.normal(jax.random.key(0), start.shape)
  assert float(jnp.exp(token_log_policy(any_logits)).sum()) == pytest.approx(1)
  # the last prefix of H - 1 bits is all ones: its logit moves the last two strings only
  moved = token_log_policy(any_logits.at[-1].add(1)) - token_log_policy(any_logits)
  assert set(np.flatnonzero(np.abs(np.asarray(moved)) > 1e-9)) == {14, 15}


@pytest.mark.parametrize("policies", ["softmax", "tokens"])
def test_a_bonus_under_gradient_descent_moves_away_from_the_reference(policies):
  kind = "lock" if policies == "tokens" else "arms"
  settings = {
    "kind": kind,
    "size": 2,
    "bs": (0.05,),
    "policies": policies,
    "updates": 1,
    "alpha": 1.0,
    "inner": 1,
    "rate": 0.01,
  }
  mass = {}
  for algorithm in ("xpo", "dpo_reference", "xpo_flipped"):
    model, _ = learnt(1, algorithm=algorithm, **settings)
    cfg = BanditConfig(**settings, algorithm=algorithm)
    mass[algorithm] = np.mean([np.exp(bandit.policy(cfg, theta))[0] for theta in np.asarray(model.theta[...])[0]])
  assert mass["xpo"] < mass["dpo_reference"] < mass["xpo_flipped"]
