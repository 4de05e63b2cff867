"""Stacks of games under the loop: the library's updates, the theorem's certificate, every mesh, and a second start."""

import dataclasses
import sys

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from experiments.prefgames.__main__ import build, report, run
from experiments.prefgames.experiment import Config
from experiments.prefgames.games import draw
from experiments.prefgames.tables import TableConfig
from research import config
from research.errors import UserError
from research.fit import abstract_state, fresh_state, jit_step
from research.mesh import MeshConfig, to_devices
from research.preference import tabular


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def trained(steps: int = 1, devices: int = 1, games: int = 8, n: int = 5, seed: int = 0, **table):
  """(the metrics of each step, the policies' logits [rates, games, n], the evaluations) of a few steps."""
  tx = dataclasses.replace(Config().tx, warmup=0)
  cfg = Config(batch=games, length=n, seeds=(seed,), table=TableConfig(**table), tx=tx, mesh=MeshConfig(data=devices))
  mesh = jax.make_mesh((1, devices, 1), ("replica", "data", "model"), devices=jax.devices()[:devices])
  with jax.set_mesh(mesh):
    exp = build(cfg)
    abstract = abstract_state(exp)
    state, step = fresh_state(exp, abstract, seed), jit_step(exp, cfg, abstract)
    rows, seen = to_devices(next(iter(exp.data("train")))), []
    for _ in range(steps):
      state, metrics = jax.block_until_ready(step(state, rows))
      seen.append({name: float(x) for name, x in metrics.items()})
    evals = {kind: f(state.model) for kind, f in exp.evals.items()}
    return seen, np.asarray(state.model.theta[...]), evals


def test_draws_are_the_seeds_and_hold_each_games_equilibrium():
  rows = draw(("uniform", "transitive"), 3, 8, 5, 0.1)
  assert rows["preferences"].shape == (8, 5, 5)
  again, other = draw(("uniform",), 3, 4, 5, 0.1), draw(("uniform",), 4, 4, 5, 0.1)
  np.testing.assert_array_equal(rows["preferences"][:4], again["preferences"])
  assert np.abs(again["preferences"] - other["preferences"]).max() > 0.1
  z = rows["log_reference"] + np.einsum("gij,gj->gi", rows["preferences"], np.exp(rows["log_equilibrium"])) / 0.1
  best = z - np.logaddexp.reduce(z, axis=-1, keepdims=True)
  np.testing.assert_allclose(best, rows["log_equilibrium"], atol=1e-10)


@pytest.mark.parametrize("method", ["egpo", "nash_md_pg", "optimistic", "mpo"])
def test_a_step_of_the_loop_is_the_librarys_updates_one_by_one(method):
  rates, updates = (0.1, 0.7), 7
  _, theta, _ = trained(steps=2, method=method, b=0.05, rates=rates, updates=updates)
  rows = draw(("uniform",), 0, 8, 5, 0.05)
  one = jax.jit(tabular.METHODS[method].__call__)
  for i, eta in enumerate(rates):
    for g in (0, 5):
      game = tabular.Game(rows["preferences"][g], jnp.asarray(rows["log_reference"][g]), 0.05)
      state = tabular.start(game.log_reference - jnp.mean(game.log_reference))
      for _ in range(2 * updates):
        state = one(game, state, eta)
      np.testing.assert_allclose(theta[i, g], state.theta, atol=1e-12)


def test_egpos_kl_shrinks_by_the_theorems_factor_in_every_update_and_grows_where_eta_b_exceeds_1():
  b, rates = 1.0, (0.25, 0.75, 3.0)
  seen, _, _ = trained(steps=20, games=32, method="egpo", b=b, rates=rates, updates=1)
  for eta in rates[:2]:
    assert max(m[f"contraction@{eta:g}"] for m in seen) <= 1 - eta * b + 1e-6
  assert max(m["contraction@3"] for m in seen) > 1
  seen, _, _ = trained(steps=20, games=32, method="egpo", b=0.01, rates=(4.0,), updates=1)
  assert 0.5 < max(m["contraction"] for m in seen) <= 1 - 4 * 0.01


@pytest.mark.parametrize("method", ["online_ipo_uniform", "egpo"])
def test_gradient_descent_at_the_converted_rate_is_the_methods_own_update(method):
  b, n, eta = 0.05, 5, 0.8
  _, own, _ = trained(method=method, b=b, rates=(eta,), updates=20)
  _, sgd, _ = trained(method=method, b=b, rates=(eta * b * n / 4,), updates=20, rule="sgd")
  np.testing.assert_allclose(sgd, own, atol=1e-12)


def test_momentum_orbits_a_cycle_on_which_gradient_descent_converges():
  shared = {"kinds": ("cycle",), "method": "egpo", "b": 0.01, "updates": 4000, "n": 3, "rates": (0.001,)}
  _, _, plain = trained(rule="sgd", **shared)
  _, _, momentum = trained(rule="momentum", **shared)
  assert plain["cycle"]["gap"] < 1e-3
  assert momentum["cycle"]["gap"] > 0.1
  assert momentum["cycle"]["failed"] == 1


def test_egpo_fails_in_no_game_and_online_ipo_in_random_ones_only():
  shared = {"kinds": ("uniform", "transitive"), "games": 32, "n": 10, "b": 0.01, "rates": (0.8,), "updates": 2500}
  _, _, egpo = trained(method="egpo", **shared)
  _, _, ipo = trained(method="online_ipo_uniform", **shared)
  assert {kind: found["failed"] for kind, found in egpo.items()} == {"uniform": 0, "transitive": 0}
  assert ipo["uniform"]["failed"] > 0
  assert ipo["transitive"]["failed"] == 0


def test_the_original_games_last_policy_cycles_and_its_average_does_not():
  shared = {"kinds": ("cycle",), "n": 5, "b": 0.1, "rates": (0.1,), "updates": 5000}
  _, _, weights = trained(method="sppo", **shared)
  _, _, magnet = trained(method="mpo", **shared)
  assert weights["cycle"]["original"] > 10 * weights["cycle"]["original_average"]
  assert magnet["cycle"]["original"] < weights["cycle"]["original_average"]


@pytest.mark.parametrize(("rule", "samples"), [("own", 10), ("adam", 0)])
def test_four_devices_share_the_games_out_and_change_nothing(rule, samples):
  both = [trained(steps=2, devices=d, rates=(0.1,), updates=3, rule=rule, samples=samples) for d in (1, 4)]
  np.testing.assert_allclose(both[1][1], both[0][1], atol=1e-13)
  for a, b in zip(both[0][0], both[1][0], strict=True):
    assert b == pytest.approx(a, rel=1e-9)


def test_a_run_in_float64_is_restored_to_the_bit(monkeypatch, tmp_path, capsys):
  with jax.enable_x64(False):  # as a command finds it
    spec = "experiments/prefgames/configs/optimisers.py:tiny"
    flags = [f"--config={spec}", "--config.only=egpo-adam", "--config.seeds=0", f"--workdir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    for _ in range(2):
      run.main(build, report)
    assert "complete at step 6" in capsys.readouterr().err
    assert jnp.zeros(()).dtype == jnp.float32


@pytest.mark.parametrize(
  ("override", "field"),
  [
    ("table.b=0", "table.b"),
    ("table.rates=", "table.rates"),
    ("table.method=nash_md table.b=0.1 table.rates=11", "table.rates"),
    ("strings.length=6", "strings.length"),
    ("pair.differ=13", "pair.differ"),
    ("table.method=egpoo", "table.method"),
    ("table.rule=adam table.method=optimistic", "table.rule"),
    ("table.rule=sgd table.decay=true", "table.decay"),
    ("bandit.policies=tokens", "bandit.policies"),
    ("bandit.size=0", "bandit.size"),
  ],
)
def test_a_bad_setting_is_told_by_its_name(override, field):
  with pytest.raises(UserError, match=field):
    config.load("experiments/prefgames/configs/tabular.py", override.split())


def test_a_mixtures_share_is_checked_under_another_rule_too():
  table = TableConfig(method="nash_md", rule="sgd", rates=(0.1, 3.0))
  with pytest.raises(UserError, match=r"table.rates=.*: times 4 / length=10 is the reference's share"):
    build(Config(table=table, batch=8))


@pytest.mark.parametrize(
  ("change", "field"), [({"batch": 9}, "batch"), ({"length": 2}, "length"), ({"accumulate": 2}, "acc")]
)
def test_a_bad_number_of_games_is_told_before_anything_runs(change, field):
  cfg = dataclasses.replace(Config(table=TableConfig(kinds=("uniform", "cycle"))), **{"batch": 8, **change})
  mesh = jax.make_mesh((1, 1, 1), ("replica", "data", "model"), devices=jax.devices()[:1])
  with jax.set_mesh(mesh), pytest.raises(UserError, match=field):
    build(cfg).info()
