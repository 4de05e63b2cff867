"""Win rates against counts by hand, and their errors against many tournaments."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from research.evals import win_rates
from research.generation import Sampling
from research.models.transformer import Transformer
from research.preference.oracles import BradleyTerry
from research.preference.samplers import Responses
from tests import small

ORACLE = BradleyTerry(lambda prompt, y: jnp.sum(y.tokens * y.mask, axis=1))


def batches(rows=8, padding=2):
  weights = np.ones(rows, np.float32)
  weights[rows - padding :] = 0
  return [{"prompts": np.ones((rows, 2), np.int32), "lengths": np.full(rows, 2, np.int32), "weights": weights}]


def written(scores):
  """Responses [batch][response] of one id each, from scores [rows, responses]."""
  one = lambda x: Responses(jnp.asarray(x[:, None], jnp.int32), jnp.ones((len(x), 1)))
  return [[one(scores[:, j]) for j in range(scores.shape[1])]]


def test_a_matrix_is_the_mean_over_prompts_with_its_standard_error():
  rng = np.random.default_rng(0)
  scores = {name: rng.integers(0, 3, (8, 4)) for name in "ab"}
  with small.use():
    found = win_rates.matrix(ORACLE, batches(), {name: written(s) for name, s in scores.items()})
  p = (1 / (1 + np.exp(scores["b"] - scores["a"]))).mean(1)[:6]  # the last two rows are padding
  rate, error = found["a", "b"]
  assert rate == pytest.approx(p.mean(), rel=1e-5)
  assert error == pytest.approx(p.std(ddof=1) / np.sqrt(6), rel=1e-3)
  assert found["b", "a"] == (pytest.approx(1 - rate), error)
  assert found["a", "a"] == (0.5, 0.0)


def test_the_error_is_that_of_new_prompts():
  rng = np.random.default_rng(1)
  rates, errors = [], []
  with small.use():
    for _ in range(60):
      hard = rng.integers(0, 3, (16, 1))  # responses to one prompt are alike
      made = {"a": written(np.repeat(hard, 4, 1)), "b": written(rng.integers(0, 3, (16, 4)))}
      rate, error = win_rates.matrix(ORACLE, batches(16, 0), made)["a", "b"]
      rates.append(rate)
      errors.append(error)
  assert np.mean(errors) == pytest.approx(np.std(rates, ddof=1), rel=0.3)


def test_what_a_model_answers_depends_on_the_seed_and_ends_with_the_stop():
  cfg = small.varied(vocab=8, width=16, layers=1, heads=2, kv_heads=1, mlp_width=16)
  with small.use():
    model = jax.tree.map(lambda x: 3 * x, Transformer(jax.random.key(0), cfg))
    make = lambda seed, player=0: win_rates.responses(
      model, batches(), each=2, tokens=5, stop=(3,), sampling=Sampling(top_k=6), seed=seed, player=player
    )
    first, again, other, opponent = make(0), make(0), make(1), make(0, player=1)
  assert len(first) == 1
  assert len(first[0]) == 2
  tokens = lambda made: np.stack([np.asarray(y.tokens) for y in made[0]])
  np.testing.assert_array_equal(tokens(first), tokens(again))
  assert (tokens(first) != tokens(other)).any()
  # a model that meets itself does not meet its own answers: a win rate is that of independent ones
  assert (tokens(first) != tokens(opponent)).any()
  assert (tokens(first)[0] != tokens(first)[1]).any()
  for ids, mask in zip(tokens(first)[0], np.asarray(first[0][0].mask), strict=True):
    assert 3 not in ids[: int(mask.sum()) - 1]
