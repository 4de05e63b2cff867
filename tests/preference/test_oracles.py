"""Preference oracles: all keep P(y, y2) + P(y2, y) = 1, none needs a score; one that breaks it is named by its row."""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.preference import matrices, oracles

RNG = np.random.default_rng(0)
SCORES = jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32)  # [prompts, responses]
SKEW = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0.0]])
FEATURES = jnp.asarray(RNG.dirichlet(np.ones(3), size=5), jnp.float32)


def score(prompt, y):
  return SCORES[prompt, y]


def features(prompt, y):
  return FEATURES[y]


def biased_logit(model, prompt, y, y2):
  return model * y - y2 + 0.7 * prompt  # of the first place's likes: no contract in it


ORACLES = {
  "table": oracles.table(matrices.uniform(RNG, 1, 5)[0]),
  "table by prompt": oracles.table(matrices.uniform(RNG, 3, 5)),
  "bradley-terry": oracles.BradleyTerry(score),
  "cyclic": oracles.cyclic(SKEW, 4.0, features),
  "cyclic with quality": oracles.cyclic(SKEW, 4.0, features, score),
  "population": oracles.population([oracles.BradleyTerry(score), oracles.cyclic(SKEW, 2.0, features)], [0.3, 0.7]),
  "learned": oracles.Learned(jnp.float32(1.3), biased_logit),
}
PAIRS = [jnp.asarray(x) for x in (RNG.integers(3, size=40), RNG.integers(5, size=40), RNG.integers(5, size=40))]


@pytest.mark.parametrize("name", ORACLES)
def test_every_oracle_keeps_the_contract(name):
  oracles.checked(ORACLES[name], *PAIRS)
  # also as an argument of a compiled program
  p = jax.jit(lambda oracle: oracle.prob(*PAIRS))(ORACLES[name])
  assert p.shape == (40,)
  assert np.ptp(np.asarray(p)) > 0.05


@dataclasses.dataclass(frozen=True)
class Stub:
  f: object

  def prob(self, prompt, y, y2):
    return self.f(prompt, y, y2)


@pytest.mark.parametrize(
  ("f", "message"),
  [
    (lambda prompt, y, y2: jnp.where(y == y2, 0.5, 0.6), r"oracle\[1\]=0.6: and the other order must sum to 1"),
    (lambda prompt, y, y2: 0.5 + 0.6 * (y - y2), r"oracle\[1\]=1.1: must be a probability"),
    (lambda prompt, y, y2: jnp.where(y == 2, jnp.nan, 0.5), r"oracle\[2\]=nan: must be a probability"),
    (lambda prompt, y, y2: jnp.where(y >= y2, 1.0, 0.0), r"oracle\[0\]=1: and the other order"),
  ],
)
def test_an_oracle_that_breaks_the_contract_is_named_by_its_row(f, message):
  with pytest.raises(UserError, match=message):
    oracles.checked(Stub(f), jnp.zeros(3, int), jnp.array([1, 1, 2]), jnp.array([1, 0, 0]))


def test_a_response_must_be_even_with_itself():
  f = lambda prompt, y, y2: jnp.where(y == y2, 0.6, 0.5)
  with pytest.raises(UserError, match=r"oracle\[0\]=0.6: a response against itself must be 0.5"):
    oracles.checked(Stub(f), jnp.zeros(2, int), jnp.array([1, 1]), jnp.array([0, 2]))


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: oracles.table([[0.5, 0.7], [0.4, 0.5]]), r"preferences\[0, 1\]=0.7"),
    (lambda: oracles.cyclic(np.ones((2, 2)), 1.0, features), r"wins\[0, 0\]=1: must be minus"),
    (lambda: oracles.cyclic([[0, 1], [-0.5, 0]], 1.0, features), r"wins\[0, 1\]=1: must be minus"),
    (lambda: oracles.population([ORACLES["table"]], [0.5, 0.5]), "weights=2: give one for each of 1"),
    (lambda: oracles.population([ORACLES["table"]] * 2, [0.5, 0.6]), "weights=sums to 1.1"),
    (lambda: oracles.population([ORACLES["table"]] * 2, [1.0, 0.0]), r"weights\[1\]=0: must be positive"),
  ],
)
def test_an_oracle_that_is_none_is_refused_when_made(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_a_cycle_of_preferences_has_no_score():
  corners = lambda prompt, y: jnp.eye(3)[y]
  oracle = oracles.cyclic(SKEW, 2.0, corners)
  p = np.asarray(oracles.pairwise(oracle, None, jnp.arange(3)[None], 3))[0]
  assert p[0, 1] > 0.8
  assert p[1, 2] > 0.8
  assert p[2, 0] > 0.8
  np.testing.assert_allclose(p + p.T, 1, atol=1e-6)


def test_a_judge_learns_a_table_from_single_labels():
  truth = matrices.uniform(np.random.default_rng(3), 1, 4)[0]
  judge = lambda model: oracles.Learned(model, lambda m, prompt, y, y2: m[y, y2])
  i, j = np.divmod(np.arange(16), 4)

  @jax.jit
  @jax.grad
  def gradient(model):
    p = jnp.clip(judge(model).prob(None, i, j), 1e-7, 1 - 1e-7)
    return -jnp.sum(truth[i, j] * jnp.log(p) + (1 - truth[i, j]) * jnp.log1p(-p))

  model = jnp.zeros((4, 4))
  for _ in range(400):
    model = model - 1.0 * gradient(model)
  np.testing.assert_allclose(judge(model).prob(None, i, j), truth[i, j], atol=5e-3)
