"""The game in float64: gap, equilibrium and program against independent solvers, and what its inputs may not be."""

import pathlib

import numpy as np
import pytest

from research.errors import UserError
from research.preference import games, matrices

pytestmark = pytest.mark.usefixtures("float64")

GOLDEN = np.load(pathlib.Path(__file__).parent / "goldens" / "tabular.npz")
BETAS = [0.1, 0.01, 0.001]


def log_softmax(theta):
  theta = np.asarray(theta, np.float64)
  return theta - np.logaddexp.reduce(theta, axis=-1, keepdims=True)


def random_games(count, n, seed=0):
  rng = np.random.default_rng(seed)
  return (
    matrices.uniform(rng, count, n),
    log_softmax(rng.normal(size=(count, n))),
    log_softmax(rng.normal(size=(count, n))),
  )


@pytest.mark.parametrize("b", [1.0, *BETAS])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_closed_gap_is_that_of_two_best_responses(n, b):
  p, log_r, log_pi = random_games(8, n)
  q = games.win_rates(p, log_pi)
  best = games.best_response(q, log_r, b)
  two_values = games.value(p, best, log_pi, log_r, b) - games.value(p, log_pi, best, log_r, b)
  np.testing.assert_allclose(games.duality_gap(log_pi, log_r, q, b), two_values, atol=1e-13)
  for other in log_softmax(np.random.default_rng(1).normal(size=(20, 8, n))):  # nothing answers better
    assert (games.value(p, other, log_pi, log_r, b) <= games.value(p, best, log_pi, log_r, b) + 1e-12).all()


@pytest.mark.parametrize("b", [1.0, 0.1, 0.01])
def test_the_gap_is_twice_openspiels_exploitability(b):
  fix = "comes with pip install -e .[test]"
  symmetric = pytest.importorskip(
    "open_spiel.python.algorithms.adidas_utils.helpers.symmetric.exploitability", reason=fix
  )
  p, log_r, log_pi = random_games(5, 6)
  q = games.win_rates(p, log_pi)
  for game, r, pi, gap in zip(p, log_r, log_pi, np.asarray(games.duality_gap(log_pi, log_r, q, b)), strict=True):
    payoff = game + b * r[:, None]
    expected = symmetric.qre_exploitability(np.exp(pi), np.stack([payoff, payoff.T]), temperature=b)
    assert gap == pytest.approx(2 * expected, abs=1e-12)


@pytest.mark.parametrize("b", BETAS)
@pytest.mark.parametrize("seed", range(3))
def test_the_equilibrium_is_the_recorded_one_and_has_no_gap(seed, b):
  p, log_r = GOLDEN[f"{seed}/P"].astype(np.float64), log_softmax(GOLDEN[f"{seed}/ref_logits"])
  log_pi = games.equilibrium(p, log_r, b)
  np.testing.assert_allclose(log_pi, GOLDEN[f"{seed}/beta{b}/ne_log_policy"], atol=1e-9)
  q = games.win_rates(p, log_pi)
  np.testing.assert_allclose(games.best_response(q, log_r, b), log_pi, atol=1e-10)
  assert np.abs(games.duality_gap(log_pi, log_r, q, b)).max() < 1e-12
  np.testing.assert_allclose(games.value(p, log_pi, log_pi, log_r, b), 0.5, atol=1e-14)


@pytest.mark.parametrize("b", [3.0, 0.3, 0.003])
def test_equilibria_of_many_games_solve_their_equation(b):
  for n in (2, 3, 25):
    p, log_r, _ = random_games(4, n, seed=n)
    log_pi = games.equilibrium(p, 3 * log_r - np.logaddexp.reduce(3 * log_r, -1, keepdims=True), b)
    z = log_pi - (3 * log_r + p @ np.exp(log_pi)[..., None] @ [1] / b)
    assert np.ptp(z, axis=-1).max() < 1e-10


def test_rock_paper_scissors_is_won_by_nobody_and_a_transitive_game_by_the_best():
  uniform = np.log(np.full(3, 1 / 3))
  np.testing.assert_allclose(games.equilibrium(matrices.cyclic(3), uniform, 0.1), uniform, atol=1e-12)
  np.testing.assert_allclose(games.nash(matrices.cyclic(3)), 1 / 3, atol=1e-12)
  best = games.nash(matrices.bradley_terry([0.0, 2.0, 1.0]))
  np.testing.assert_allclose(best, [0, 1, 0], atol=1e-12)


def test_a_response_that_is_never_played_costs_no_kl():
  uniform, pure = np.log(np.full(3, 1 / 3)), np.array([0.0, -np.inf, -np.inf])
  np.testing.assert_allclose(games.kl(pure, uniform), np.log(3))
  p, b = matrices.cyclic(3), 0.1  # the first beats the third and loses to the second
  np.testing.assert_allclose(games.value(p, pure, uniform, uniform, b), 0.5 - b * np.log(3))
  expected = 2 * b * np.log((np.exp(0.5 / b) + np.exp(1 / b) + 1) / 3) + 2 * b * np.log(3) - 1
  np.testing.assert_allclose(games.duality_gap(pure, uniform, games.win_rates(p, pure), b), expected)


@pytest.mark.parametrize("seed", range(3))
def test_the_linear_program_is_recorded_and_nashpys(seed):
  p = GOLDEN[f"{seed}/P"].astype(np.float64)
  for game, expected in zip(p, GOLDEN[f"{seed}/lp_nash_unregularised"], strict=True):
    pi = games.nash(game)
    np.testing.assert_allclose(pi, expected, atol=1e-9)
    assert games.original_gap(game @ pi) < 1e-12
  nashpy = pytest.importorskip("nashpy", reason="comes with pip install -e .[test]")
  ours, theirs = games.nash(p[0]), nashpy.Game(p[0] - 0.5).linear_program()
  np.testing.assert_allclose(ours, theirs[0], atol=1e-8)


@pytest.mark.parametrize("b", BETAS)
def test_the_regularised_equilibrium_is_no_further_from_the_originals_than_its_bound(b):
  p, log_r, _ = random_games(20, 5)
  log_pi = games.equilibrium(p, log_r, b)
  gap = games.original_gap(games.win_rates(p, log_pi))
  assert (np.asarray(gap) <= games.bias_bound(log_r, b)).all()
  assert np.asarray(gap).max() > 0


def _spoilt(at, value):
  p = matrices.cyclic(4, 0.7)
  p[at] = value
  return p


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: matrices.checked(_spoilt((1, 2), 1.5)), r"preferences\[1, 2\]=1.5: must be a probability"),
    (lambda: matrices.checked(_spoilt((3, 1), np.nan)), r"preferences\[3, 1\]=nan: must be a probability"),
    (lambda: matrices.checked(_spoilt((0, 2), 0.6)), r"preferences\[0, 2\]=0.6: must be 1 minus the entry across"),
    (lambda: matrices.checked(_spoilt((2, 2), 0.4)), r"preferences\[2, 2\]=0.4: must be 1 minus"),
    (lambda: matrices.checked(np.zeros((2, 3))), r"preferences=shape \(2, 3\): must be square"),
    (lambda: matrices.checked_policy([0.5, 0.0, 0.5]), r"reference\[1\]=0: must be positive"),
    (lambda: matrices.checked_policy([0.5, 0.6]), "reference=sums to 1.1: probabilities must sum to 1"),
    (
      lambda: games.equilibrium(matrices.cyclic(3), np.array([-0.7, -0.7, -np.inf]), 0.1),
      r"reference\[2\]=0: must be pos",
    ),
    (lambda: games.equilibrium(matrices.cyclic(3), np.log(np.full(3, 1 / 3)), 0.0), "b=0.0: must be positive"),
    (lambda: games.nash(_spoilt((1, 0), 0.9)), r"preferences\[0, 1\]=0.3: must be 1 minus"),
    (lambda: matrices.cyclic(2), "n=2: a cycle needs at least 3"),
    (lambda: matrices.cyclic(3, 1.1), "win=1.1: must be a probability"),
    (lambda: matrices.population([matrices.cyclic(3)], [0.5]), "weights=sums to 0.5"),
  ],
)
def test_a_game_that_is_none_is_refused_by_its_entry(call, message):
  with pytest.raises(UserError, match=message):
    call()


def test_transitive_annotators_can_make_a_cycle():
  ranks = np.array([[3.0, 2, 1], [1, 3, 2], [2, 1, 3]])  # each puts another first
  p = matrices.checked(matrices.population(matrices.bradley_terry(10 * ranks), np.full(3, 1 / 3)))
  assert p[0, 1] > 0.6
  assert p[1, 2] > 0.6
  assert p[2, 0] > 0.6
