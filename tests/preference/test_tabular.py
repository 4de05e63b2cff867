"""Tabular learning: the official trajectories, closed forms of each step, fixed points, and samples without bias."""

import dataclasses
import functools
import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.preference import comparisons, games, matrices, tabular
from research.preference.tabular import METHODS, Game, Sampled, run, start

pytestmark = pytest.mark.usefixtures("float64")

GOLDEN = np.load(pathlib.Path(__file__).parent / "goldens" / "tabular.npz")
RATES = {0.1: 0.1, 0.01: 0.02, 0.001: 0.0002}
half_mixture = functools.partial(tabular.mixture, strength=0.5)  # as the public code has it
OFFICIAL = {
  "oipo1_omd": METHODS["online_ipo_uniform"],
  "oipo2": METHODS["online_ipo_policy"],
  "nash_md": dataclasses.replace(METHODS["nash_md"], opponent=half_mixture),
  "nash_md_pg": dataclasses.replace(METHODS["nash_md_pg"], opponent=half_mixture),
  "egpo": METHODS["egpo"],
}


def log_softmax(theta):
  theta = np.asarray(theta, np.float64)
  return theta - np.logaddexp.reduce(theta, axis=-1, keepdims=True)


def centred(x):
  return x - np.mean(x, axis=-1, keepdims=True)


def one_game(n=5, b=0.1, seed=0):
  rng = np.random.default_rng(seed)
  log_r = log_softmax(rng.normal(size=n))
  game = Game(jnp.asarray(matrices.uniform(rng, 1, n)[0]), jnp.asarray(log_r), jnp.asarray(b))
  return game, jnp.asarray(centred(rng.normal(size=n)))


@functools.partial(jax.jit, static_argnames=("method", "steps", "every", "decay"))
def _paths(method, p, log_r, b, eta, steps, every, decay):
  def one(p, log_r):
    game = Game(p, log_r, b)
    measure = lambda state: (state.theta, game.gap(state.theta))
    return run(method, game, start(log_r), decay or eta, steps, measure, every=every)[1]

  return jax.vmap(one)(p, log_r)


def paths(method, p, log_r, b, eta, steps, every, decay=None):
  """(theta, gap) [games, 1 + steps / every, ...]; decay: eta as a function of the updates made."""
  return jax.tree.map(np.asarray, _paths(method, p, log_r, b, eta, steps, every, decay))


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("b", RATES)
def test_the_official_trajectories_are_met_in_float64(name, b):
  p = np.concatenate([GOLDEN[f"{seed}/P"] for seed in range(3)]).astype(np.float64)
  log_r = log_softmax(np.concatenate([GOLDEN[f"{seed}/ref_logits"] for seed in range(3)]))
  golden = lambda what: np.concatenate([GOLDEN[f"{seed}/beta{b}/{name}/{what}"] for seed in range(3)])
  steps = 10 * (golden("gap").shape[1] - 1)
  theta, gap = paths(OFFICIAL[name], p, log_r, b, 4 * RATES[b] / (10 * b), 300, 1)  # one program for every b
  np.testing.assert_allclose(gap[:, : steps + 1 : 10], golden("gap"), atol=1e-9)
  np.testing.assert_allclose(gap[:, : steps + 1 : 10], golden("gap_official_float32"), atol=5e-5)
  for what, at in (("theta_1", 1), ("theta_2", 2), ("theta_10", 10), ("theta_final", steps)):
    np.testing.assert_allclose(theta[:, at], centred(golden(what)), atol=1e-9)
  star = np.concatenate([GOLDEN[f"{seed}/beta{b}/ne_log_policy"] for seed in range(3)])
  np.testing.assert_allclose(games.kl(star, log_softmax(theta[:, steps])), golden("kl_ne_to_final"), atol=1e-9)
  np.testing.assert_allclose(
    gap[:, 0], np.concatenate([GOLDEN[f"{seed}/beta{b}/initial_gap_closed_form"] for seed in range(3)]), atol=1e-9
  )
  if name != "egpo":  # of which the first half step's is that of online IPO
    step = centred(theta[:, 1] - theta[:, 0])
    np.testing.assert_allclose(step, -RATES[b] * centred(golden("grad_at_step0")), atol=1e-9)


def official_loss(name, b, p, theta, log_r):
  """Of one game in the middle of an update: the squared losses at theta; of EGPO the second half step's."""
  d = log_softmax(theta) - log_r
  own = np.exp(log_softmax(theta))
  game = Game(jnp.asarray(p), jnp.asarray(log_r), jnp.asarray(b))
  eta = 4 * RATES[b] / (10 * b)
  contrast = d[:, None] - d[None, :]
  if name == "oipo2":
    return np.sum(own[:, None] * own[None, :] * (contrast - (p - 0.5) / b) ** 2)
  opponent = theta
  if name == "nash_md":
    opponent = half_mixture(game, theta, eta)
  elif name == "egpo":
    opponent = METHODS["online_ipo_uniform"](game, start(jnp.asarray(theta)), eta).theta
  q = np.asarray(game.win_rates(jnp.asarray(opponent)))
  return np.mean((contrast - (q[:, None] - q[None, :]) / b) ** 2)


@pytest.mark.parametrize("name", [name for name in OFFICIAL if name != "nash_md_pg"])
@pytest.mark.parametrize("b", RATES)
def test_the_first_losses_are_the_official_ones(name, b):
  for seed in range(3):
    p, theta = (GOLDEN[f"{seed}/{x}"].astype(np.float64) for x in ("P", "ref_logits"))
    found = sum(official_loss(name, b, *game) for game in zip(p, theta, log_softmax(theta), strict=True))
    np.testing.assert_allclose(found, GOLDEN[f"{seed}/beta{b}/{name}/loss_at_step0"], rtol=1e-9)


def test_the_rate_of_a_mode_is_its_responses_probability_where_pairs_are_the_policys_own():
  """Why they stall: the slowest mode's rate is b for uniform pairs, b n pi for own ones, b^2 n pi / 4 in PG."""
  n, b = 6, 0.1
  log_r = log_softmax(np.zeros(n))
  p = matrices.bradley_terry(np.linspace(0, 2, n))
  game = Game(jnp.asarray(p), jnp.asarray(log_r), jnp.asarray(b))
  star = jnp.asarray(games.equilibrium(p, log_r, b))
  rarest = float(jnp.exp(jnp.min(star)))
  assert rarest < 2e-2

  def slowest(field):
    jacobian = np.asarray(jax.jacobian(lambda theta: field(game, theta, theta, None, None))(star))
    return np.sort(-np.linalg.eigvals(jacobian).real)[1]  # the least is that of the constant, 0

  assert slowest(tabular.uniform_pairs) == pytest.approx(b, rel=0.05)
  assert slowest(tabular.policy_pairs) < 2 * b * n * rarest
  assert slowest(tabular.policy_gradient) < b**2 * n / 4 * 2 * rarest


SAMPLED = {
  "online_ipo_1_sample": ("uniform_pairs", ("idx0", "idx1", "idx2")),
  "nash_md_sample": ("uniform_pairs", ("idx0", "idx1", "idx2")),
  "online_ipo_2_sample": ("policy_pairs", ("idx0", "idx1")),
}


def test_a_gradient_step_on_the_squared_loss_is_mirror_descent():
  game, theta = one_game()
  n, b, eta = 5, 0.1, 0.7

  def loss(theta, q):
    d = jax.nn.log_softmax(theta) - game.log_reference
    return jnp.mean(((d[:, None] - d[None, :]) - (q[:, None] - q[None, :]) / b) ** 2)

  q = game.win_rates(theta)
  grad = jax.grad(loss)(theta, q)
  d = jax.nn.log_softmax(theta) - game.log_reference
  np.testing.assert_allclose(grad, 4 / n * centred(d - q / b), atol=1e-12)
  stepped = METHODS["online_ipo_uniform"](game, start(theta), eta).theta
  np.testing.assert_allclose(stepped, centred(theta - eta * b * n / 4 * grad), atol=1e-12)
  closed = (1 - eta * b) * theta + eta * b * game.log_reference + eta * q
  np.testing.assert_allclose(stepped, centred(closed), atol=1e-12)
  # EGPO: both lines start from theta, and only the opponent moves
  half = jnp.asarray(closed)
  whole = (1 - eta * b) * theta + eta * b * game.log_reference + eta * game.win_rates(half)
  np.testing.assert_allclose(METHODS["egpo"](game, start(theta), eta).theta, centred(whole), atol=1e-12)
  by_loss = theta - eta * b * n / 4 * jax.grad(loss)(theta, game.win_rates(half))
  np.testing.assert_allclose(centred(by_loss), centred(whole), atol=1e-12)


def _policy_loss(game, theta, weights):
  d = jax.nn.log_softmax(theta) - game.log_reference
  return jnp.sum(weights * ((d[:, None] - d[None, :]) - (game.preferences - 0.5) / game.b) ** 2)


def test_the_fields_are_gradients_of_their_losses():
  game, theta = one_game()
  n, b = 5, 0.1
  pi = jax.nn.softmax(theta)
  grad = jax.grad(lambda t: _policy_loss(game, t, pi[:, None] * pi[None, :]))(theta)
  field = tabular.policy_pairs(game, theta, theta, None, None)
  np.testing.assert_allclose(field, -b * n / 4 * grad, atol=1e-12)

  mixed = tabular.mixture(game, theta, 0.5)
  objective = lambda t: games.value(
    game.preferences, jax.nn.log_softmax(t), jax.nn.log_softmax(mixed), game.log_reference, b
  )
  field = tabular.policy_gradient(game, theta, mixed, None, None)
  np.testing.assert_allclose(field, b * n / 4 * jax.grad(objective)(theta), atol=1e-12)

  data = comparisons.expected(game.preferences, jax.nn.log_softmax(theta), game.log_reference)
  dpo = lambda t: comparisons.dpo_objective(jax.nn.log_softmax(t), game.log_reference, data, b)
  field = tabular.logistic_pairs(game, theta, game.log_reference, None, None)
  np.testing.assert_allclose(field, -b * n / 4 * jax.grad(dpo)(theta), atol=1e-12)


def test_closed_forms_of_the_other_rows():
  game, theta = one_game()
  eta, b = 0.4, 0.1
  q = game.win_rates(theta)
  step = lambda name: METHODS[name](game, start(theta), eta).theta
  np.testing.assert_allclose(step("sppo"), centred(theta + eta * q), atol=1e-12)
  np.testing.assert_allclose(step("inpo"), step("online_ipo_uniform"), atol=0)
  # MMD as its argmax, the magnet being where it began
  moved = (theta + eta * b * theta + eta * q) / (1 + eta * b)
  np.testing.assert_allclose(step("mmd"), centred(moved), atol=1e-12)
  # ONPO: pi_t a step ahead of pi'_t along r_{t-1}, then pi'_{t+1} along r_t
  anchor, played, state = theta, theta, start(theta)
  for _ in range(3):
    r = game.win_rates(played)
    anchor = anchor + eta * r
    played = anchor + eta * r
    state = METHODS["onpo"](game, state, eta)
    np.testing.assert_allclose(state.theta, centred(played), atol=1e-12)
  # APO: steps of SPPO from what is extrapolated from the last two
  anchor, played, state = theta, theta, start(theta)
  for _ in range(3):
    before, anchor = anchor, played + eta * game.win_rates(played)
    played = anchor + 0.3 * (anchor - before)
    state = METHODS["apo"](game, state, eta)
    np.testing.assert_allclose(state.theta, centred(played), atol=1e-12)
  # with KL terms
  anchor, played, state = theta, theta, start(theta)
  pull = lambda x, r: (1 - eta * b) * x + eta * b * game.log_reference + eta * r
  for _ in range(3):
    r = game.win_rates(played)
    anchor = pull(anchor, r)
    played = pull(anchor, r)
    state = METHODS["optimistic"](game, state, eta)
    np.testing.assert_allclose(state.theta, centred(played), atol=1e-12)


@pytest.mark.parametrize("name", ["online_ipo_uniform", "online_ipo_policy", "egpo", "optimistic", "inpo", "mmd"])
def test_the_equilibrium_is_a_fixed_point(name):
  game, _ = one_game(n=8)
  star = jnp.asarray(games.equilibrium(game.preferences, game.log_reference, 0.1))
  state = dataclasses.replace(start(star), anchor=game.log_reference if name == "mmd" else star)
  for _ in range(3):
    state = METHODS[name](game, state, 0.4)
  np.testing.assert_allclose(state.theta, centred(star), atol=1e-12)


def test_constant_nash_md_stops_short_of_the_equilibrium_and_a_decaying_one_does_not():
  p = GOLDEN["0/P"][:4].astype(np.float64)
  log_r = log_softmax(GOLDEN["0/ref_logits"][:4])
  star = games.equilibrium(p, log_r, 0.1)
  errors, gaps = [], []
  for eta in (0.4, 0.2, 0.1):
    theta, gap = paths(METHODS["nash_md"], p, log_r, 0.1, eta, 2000, 2000)
    errors.append(np.abs(centred(theta[:, -1]) - centred(star)).max())
    gaps.append(gap[:, -1].max())
  # the error is linear in eta and the gap quadratic
  np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2, rtol=0.15)
  np.testing.assert_allclose(np.divide(gaps[:-1], gaps[1:]), 4, rtol=0.3)
  assert errors[-1] > 1e-3
  _, gap = paths(METHODS["nash_md"], p, log_r, 0.1, 0.0, 5000, 5000, decay=lambda t: 40 / (100 + t))
  assert gap[:, -1].max() < 1e-7


@pytest.mark.parametrize("b", [0.01, 0.1, 1.0])
def test_egpo_contracts_to_the_equilibrium_by_its_rate_in_every_step(b):
  rng = np.random.default_rng(0)
  p, log_r = matrices.uniform(rng, 20, 6), log_softmax(2 * rng.normal(size=(20, 6)))
  star = games.equilibrium(p, log_r, b)
  for eta in (1 / (b + 3), 3 / (b + 3)):
    theta, _ = paths(METHODS["egpo"], p, log_r, b, eta, 60, 1)
    kl = np.asarray(games.kl(star[:, None], log_softmax(theta)))
    assert (kl[:, 1:] <= (1 - eta * b) * kl[:, :-1] + 1e-13).all()
  if b == 1:  # the step is longer than the way
    theta, _ = paths(METHODS["egpo"], p, log_r, b, 1.5, 10, 1)
    kl = np.asarray(games.kl(star[:, None], log_softmax(theta)))
    assert (kl[:, 1:] > np.maximum(1 - 1.5 * b, 0) * kl[:, :-1] + 1e-13).any()


FIELDS = [tabular.uniform_pairs, tabular.policy_pairs, tabular.policy_gradient, tabular.logistic_pairs]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.__name__)
def test_sampled_fields_have_no_bias(field, hard):
  game, theta = one_game(n=4)
  opponent = tabular.mixture(game, theta, 3.0)
  exact = np.asarray(field(game, theta, opponent, None, None))
  one = jax.jit(jax.vmap(lambda key: field(game, theta, opponent, key, Sampled(10, hard))))
  draws = np.asarray(one(jax.random.split(jax.random.key(0, impl="unsafe_rbg"), 10_000)))
  error = draws.std(axis=0) / 100
  assert (np.abs(draws.mean(axis=0) - exact) < 5 * error).all()
  assert (error < 0.1 * np.abs(exact).max()).all()  # else it would show nothing


def test_samples_of_the_official_losses_give_their_gradients():
  games_ = GOLDEN["0/P"].astype(np.float64)
  theta, log_r = (x.astype(np.float64) for x in (GOLDEN["0/sampled/theta"], log_softmax(GOLDEN["0/ref_logits"])))
  losses_ = {}
  for name, (field, arrays) in SAMPLED.items():
    drawn = [GOLDEN[f"0/sampled/{name}/{x}"].astype(int) for x in arrays]
    for i, p in enumerate(games_):
      d = log_softmax(theta[i]) - log_r[i]
      y, y2 = drawn[0][i], drawn[1][i]
      wins = p[y, drawn[2][i]] - p[y2, drawn[2][i]] if field == "uniform_pairs" else p[y, y2] - 0.5
      moved = tabular._contrast(10, y, y2, jnp.asarray(wins - 0.01 * (d[y] - d[y2])))
      expected = GOLDEN[f"0/sampled/{name}/grad_theta"][i]
      np.testing.assert_allclose(-2 / 0.01 * np.asarray(moved), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
      total = np.mean(((d[y] - d[y2]) - wins / 0.01) ** 2)
      losses_[name] = losses_.get(name, 0) + total
  for name, total in losses_.items():
    np.testing.assert_allclose(total, GOLDEN[f"0/sampled/{name}/loss"], rtol=1e-4)
  drawn = [GOLDEN[f"0/sampled/nash_md_pg_sample/{x}"].astype(int) for x in ("idx0", "idx1")]
  for i, (y, y2) in enumerate(zip(*drawn, strict=True)):
    rewards = games_[i][y, y2] - 0.01 * (log_softmax(theta[i]) - log_r[i])[y]  # 1/2 is not taken off there
    scores = np.eye(10)[y] - np.exp(log_softmax(theta[i]))
    grad = -np.mean(rewards[:, None] * scores, axis=0)
    np.testing.assert_allclose(grad, GOLDEN["0/sampled/nash_md_pg_sample/grad_theta"][i], atol=1e-6)


@pytest.mark.parametrize(
  ("name", "sampled"), [("online_ipo_policy", None), ("onpo", None), ("mpo", None), ("xpo", None), ("egpo", Sampled(5))]
)
def test_many_games_at_once_are_the_games_one_by_one(name, sampled):
  rng = np.random.default_rng(0)
  p, log_r = matrices.uniform(rng, 3, 4), log_softmax(rng.normal(size=(3, 4)))
  keys = jax.random.split(jax.random.key(1), 3)

  @jax.jit
  def one(p, log_r, key):
    game, first = Game(p, log_r, 0.1), start(jnp.roll(log_r, 1))
    return run(METHODS[name], game, first, 0.4, 4, lambda s: s.theta, key=key, sampled=sampled)[1]

  together = jax.jit(jax.vmap(one))(p, log_r, keys)
  apart = [one(*game) for game in zip(p, log_r, keys, strict=True)]
  np.testing.assert_allclose(together, np.stack(apart), atol=1e-12)
  assert np.abs(together[:, -1] - together[:, 0]).max() > 1e-3


def test_the_bonus_of_xpo_moves_mass_from_what_the_reference_shows():
  game, theta = one_game()
  step = lambda alpha: dataclasses.replace(METHODS["xpo"], update=functools.partial(tabular.accumulated, alpha=alpha))(
    game, start(theta), 1.0
  )
  without, bonus, flipped = step(0.0), step(0.1), step(-0.1)
  shown = jnp.exp(game.log_reference)
  log_prob = lambda state: float(jnp.sum(shown * jax.nn.log_softmax(state.theta)))
  assert log_prob(bonus) < log_prob(without) < log_prob(flipped)
  # alpha 0 is DPO with the second response of the reference
  dpo = METHODS["online_dpo_reference"](game, start(theta), 1.0)
  np.testing.assert_allclose(without.theta, dpo.theta, atol=1e-12)


def test_xpo_learns_from_all_comparisons_so_far():
  game, theta = one_game()
  method = METHODS["xpo"]
  first = method(game, start(theta), 1.0, jax.random.key(0), Sampled(3, hard=True))
  second = method(game, first, 1.0, jax.random.key(1), Sampled(3, hard=True))
  assert float(second.data.count) == 6
  assert float(second.data.second.sum()) == 6
  assert (np.asarray(second.data.wins) >= np.asarray(first.data.wins)).all()


def test_of_a_finite_class_xpo_tries_the_arm_nobody_has_seen_and_with_the_sign_turned_never():
  # two arms: a base of reward 1/2 and a rare one, of which only comparisons of the base with itself are known
  b = 0.03
  rare = np.exp(-1 / (8 * b))
  log_r = np.log([1 - rare, rare])
  class_ = np.stack([log_r, log_softmax(log_r + np.array([0.5, 1]) / b), log_softmax(log_r + np.array([0.5, 0]) / b)])
  data = comparisons.observed(2, jnp.zeros(20, int), jnp.zeros(20, int), jnp.ones(20))
  objective = jax.jit(jax.vmap(comparisons.xpo_objective, in_axes=(0, None, None, None, None)))
  of = lambda alpha: np.asarray(objective(class_, log_r, data, b, alpha))
  np.testing.assert_allclose(of(0.0), 20 * np.log(2), rtol=1e-12)  # DPO cannot tell them apart
  assert np.argmin(of(1e-3)) == 1
  assert np.argmin(of(-1e-3)) == 2


@pytest.mark.parametrize(
  ("preferences", "reference", "b", "said"),
  [
    ([[0.5, 0.7], [0.4, 0.5]], [0.5, 0.5], 0.1, r"preferences\[0, 1\]=0.7"),
    ([[0.5, 1.2], [-0.2, 0.5]], [0.5, 0.5], 0.1, r"preferences\[0, 1\]=1.2"),
    ([[0.5, 0.7], [0.3, 0.5]], [1.0, 0.0], 0.1, r"reference\[1\]=0"),
    ([[0.5, 0.7], [0.3, 0.5]], [0.2, 0.3, 0.5], 0.1, r"reference=shape \(3,\)"),
    ([[0.5, 0.7], [0.3, 0.5]], [0.5, 0.5], -0.1, "b=-0.1"),
  ],
)
def test_a_game_that_is_none_is_refused_by_its_entry(preferences, reference, b, said):
  with pytest.raises(UserError, match=said):
    tabular.game(np.array(preferences), np.array(reference), b)


def test_a_game_of_numbers_is_the_game():
  made = tabular.game(np.array([[0.5, 0.7], [0.3, 0.5]]), np.array([0.25, 0.75]), 0.1)
  np.testing.assert_allclose(made.log_reference, np.log([0.25, 0.75]))
  assert made.preferences[0, 1] == 0.7
