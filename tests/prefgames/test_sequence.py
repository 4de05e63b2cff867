"""Short strings: exact measures against float64 tables, gradients against enumerated expectations, the knob."""

import dataclasses
import functools
import sys

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from experiments.prefgames import sequence
from experiments.prefgames.__main__ import build, report, run
from experiments.prefgames.sequence import SequenceConfig
from experiments.prefgames.strings import all_strings
from research import config
from research.mesh import BATCH
from research.models.transformer import Transformer
from research.preference import games, losses, methods
from research.preference.methods import METHODS
from research.preference.samplers import Responses, enumerated
from tests import small

VOCAB, LENGTH, B = 4, 2, 0.3
STRINGS = all_strings(VOCAB, LENGTH)
N = len(STRINGS)
TINY = small.varied(vocab=VOCAB, width=16, layers=1, heads=2, kv_heads=2, mlp_width=16)
GAMES = SequenceConfig(prompts=2, b=B, cyclic=0.5)
ROWS = sequence.draw(GAMES, 0, VOCAB, LENGTH)


def model(seed):
  return Transformer(jax.random.key(seed), TINY)


@functools.cache
def policies():
  """float64 log-probabilities [prompts, N] of policy and reference."""
  of = jax.jit(lambda m: jnp.sum(enumerated(m, ROWS["prompts"], ROWS["lengths"], STRINGS), axis=-1))
  with small.use():
    return [np.asarray(of(model(seed)), np.float64) for seed in (0, 1)]


def test_the_oracle_answers_from_the_table_and_keeps_its_contract():
  p = sequence.preferences(ROWS, STRINGS)
  i, j = (x.ravel() for x in np.meshgrid(np.arange(N), np.arange(N), indexing="ij"))
  of = lambda ids: Responses(jnp.asarray(STRINGS[ids]), jnp.ones((N * N, LENGTH)))
  batch = {name: jnp.asarray(x[1:].repeat(N * N, 0)) for name, x in ROWS.items()}
  said = sequence.oracle(VOCAB).prob(batch, of(i), of(j))
  np.testing.assert_allclose(said.reshape(N, N), p[1], atol=1e-6)
  np.testing.assert_allclose(p + p.swapaxes(1, 2), 1, atol=1e-12)


def test_the_knob_goes_from_one_score_to_none():
  drawn = [sequence.draw(dataclasses.replace(GAMES, cyclic=c), 0, VOCAB, LENGTH) for c in (0.0, 1.0)]
  transitive, circular = (sequence.preferences(rows, STRINGS) for rows in drawn)
  for p, rows in zip(transitive, drawn[0]["quality"], strict=True):
    score = np.array([rows[range(LENGTH), ids].sum() for ids in STRINGS])
    np.testing.assert_allclose(np.log(p / (1 - p)), score[:, None] - score[None, :], atol=1e-6)
    # without KL terms the equilibrium has a closed form: the best response there is, always
    np.testing.assert_allclose(games.nash(p), np.arange(N) == score.argmax(), atol=1e-9)
  for p in circular:
    assert (p.min(1) < 0.5).all()  # something beats every response
    assert games.nash(p).max() < 0.99


def test_at_knob_0_the_optimum_of_dpo_is_the_closed_form_of_the_scores():
  rows = sequence.draw(dataclasses.replace(GAMES, cyclic=0.0), 0, VOCAB, LENGTH)
  p = sequence.preferences(rows, STRINGS)[0]
  score = np.array([rows["quality"][0][range(LENGTH), ids].sum() for ids in STRINGS])
  log_r = policies()[1][0]
  i, j = (x.ravel() for x in np.meshgrid(np.arange(N), np.arange(N), indexing="ij"))

  def loss(log_policy):
    pairs = lambda x: jnp.stack([x[i], x[j]], axis=1)[..., None]
    log_policy = jax.nn.log_softmax(log_policy)
    return jnp.mean(losses.dpo(pairs(log_policy), pairs(log_r), p[i, j], jnp.ones((N * N, 2, 1)), b=B))

  with jax.enable_x64(True):
    slope = jax.jit(jax.grad(loss))
    np.testing.assert_allclose(slope(jnp.asarray(log_r + score / B)), 0, atol=1e-7)
    assert np.abs(slope(jnp.asarray(log_r))).max() > 1e-3


def test_measures_of_the_transformer_are_those_of_its_table():
  with small.use():
    measure = jax.jit(functools.partial(sequence.measures, GAMES, STRINGS))
    found = measure(model(0), model(1), cut(ROWS))
  log_policy, log_r = policies()
  p = sequence.preferences(ROWS, STRINGS)
  with jax.enable_x64(True):
    best = games.best_response(games.win_rates(p, log_policy), log_r, B)
    two_values = games.value(p, best, log_policy, log_r, B) - games.value(p, log_policy, best, log_r, B)
  np.testing.assert_allclose(found["gap"], two_values, atol=2e-6)
  wins = np.einsum("bi,bij,bj->b", np.exp(log_policy), p, np.exp(log_r))
  np.testing.assert_allclose(found["wins"], wins, atol=1e-6)
  np.testing.assert_allclose(found["kl"], games.kl(log_policy, log_r), atol=1e-5)
  # by tokens Nash-MD's opponent is another one than by responses, but close at its usual share
  assert (found["mixture_distance"] > 1e-4).all()
  assert (found["mixture_distance"] < 0.05).all()


def law(m, row):
  """log-probabilities [N] of all responses to one prompt."""
  by_token = enumerated(m, ROWS["prompts"], ROWS["lengths"], STRINGS)
  return jax.reshard(jnp.sum(by_token, axis=-1), jax.P(None, None))[row]


def enumerated_loss(m, row):
  """L = mean over i, j of ((d_i - d_j) - (q_i - q_j) / b)^2 at one prompt, q of the policy itself and held."""
  log_policy = law(m, row)
  q = jax.lax.stop_gradient(games.win_rates(sequence.preferences(ROWS, STRINGS)[row], log_policy))
  x = log_policy - policies()[1][row] - q / B
  return jnp.mean((x[:, None] - x[None, :]) ** 2)


def batch_of(rows, row=0):
  return cut({name: x[row : row + 1].repeat(rows, 0) for name, x in ROWS.items()})


def cut(arrays):
  """As the loop hands a batch to a step."""
  return {n: jax.reshard(jnp.asarray(x), jax.P(BATCH, *[None] * (x.ndim - 1))) for n, x in arrays.items()}


def close(grads, exact, atol):
  a, b = (np.concatenate([x.ravel() for x in small.leaves(g)]) for g in (grads, exact))
  assert np.linalg.norm(a - b) <= atol * np.linalg.norm(b)


def test_the_loss_on_all_pairs_has_the_gradient_of_its_expectation():
  i, j = (x.ravel() for x in np.meshgrid(np.arange(N), np.arange(N), indexing="ij"))
  log_policy = policies()[0][0]
  q = sequence.preferences(ROWS, STRINGS)[0] @ np.exp(log_policy)
  pairs = {"responses": np.stack([STRINGS[i], STRINGS[j]], axis=1), "mask": np.ones((N * N, 2, LENGTH))}
  pairs["preference"] = np.stack([q[i], q[j]], axis=1).astype(np.float32)

  def loss(m, reference):
    made = batch_of(N * N) | cut(pairs)
    made["reference"] = methods.scored(reference, made)
    return methods.loss(METHODS["online_ipo_uniform"], m, made, b=B)["loss"].value

  with small.use():
    grads = jax.jit(jax.grad(loss))(model(0), model(1))
    exact = jax.jit(jax.grad(functools.partial(enumerated_loss, row=0)))(model(0))
  close(grads, exact, 1e-3)


def test_nash_md_pgs_surrogate_has_the_gradient_of_its_objective_in_the_mean_over_all_responses():
  log_policy, log_r = (x[0] for x in policies())
  against = sequence.preferences(ROWS, STRINGS)[0] @ np.exp(log_r)  # any opponent will do
  singles = {"responses": STRINGS[:, None], "mask": np.ones((N, 1, LENGTH)), "preference": against.astype(np.float32)}

  def surrogate(m, reference):
    made = batch_of(N) | cut(singles | {"weights": np.exp(log_policy).astype(np.float32)})
    made["reference"] = methods.scored(reference, made)
    return methods.loss(METHODS["nash_md_pg"], m, made, b=B, weights=made["weights"])["loss"].value

  def objective(m):
    log_p = law(m, 0)
    return -jnp.sum(jnp.exp(log_p) * (against - 0.5 - B * (log_p - log_r)))

  with small.use():
    grads = jax.jit(jax.grad(surrogate))(model(0), model(1))
    exact = jax.jit(jax.grad(objective))(model(0))
  close(grads, exact, 1e-3)


@pytest.mark.slow
def test_sampled_gradients_of_an_update_average_to_the_enumerated_one():
  settings = sequence.OnlineConfig("online_ipo_uniform", b=B, tokens=LENGTH, pairs="uniform")
  with small.use():
    f = sequence.online.gradient(settings, sequence.oracle(VOCAB), model(1), batch_of(4096))
    mean = lambda m, keys: jax.tree.map(
      lambda g: g / 16, jax.lax.scan(one(f, m), jax.tree.map(jnp.zeros_like, m), keys)[0]
    )
    one = lambda f, m: lambda total, key: (jax.tree.map(jnp.add, total, f(m, m, key)[0]), None)
    grads = jax.jit(mean)(model(0), jax.random.split(jax.random.key(0), 16))
    exact = jax.jit(jax.grad(functools.partial(enumerated_loss, row=0)))(model(0))
  close(grads, exact, 0.03)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ("sequence.cyclic=1.5", "cyclic=1.5: is a share, in"),
    ("sequence.prompts=17", "sequence.prompts=17: there are 16 prompts of 2 ids"),
    ("length=7", "length=7: there are 4.7 responses"),
    ("batch=12", "batch=12: must be a multiple of prompts=8"),
  ],
)
def test_games_that_cannot_be_enumerated_are_refused_in_a_line(change, said, capsys, monkeypatch, tmp_path):
  spec = "experiments/prefgames/configs/sequence.py"
  monkeypatch.setattr(sys, "argv", ["", f"--config={spec}", f"--workdir={tmp_path}", f"--config.{change}"])
  with pytest.raises(SystemExit) as e:
    run.main(build, report)
  assert e.value.code == run.EXIT_USER
  assert said.replace("4.7", "4^7") in capsys.readouterr().err


def test_every_arm_asks_as_many_preferences():
  cfg = config.load("experiments/prefgames/configs/sequence.py")
  asked = {
    METHODS[single.sequence.online.method].queries * single.sequence.online.updates for _, single in config.expand(cfg)
  }
  assert asked == {40}
