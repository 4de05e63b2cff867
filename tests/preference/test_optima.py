"""Where preference losses are least, in closed form, on a space small enough to enumerate."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from research.preference import distillation, games, losses
from tests.preference.gradients import rows_and_grad

pytestmark = pytest.mark.usefixtures("float64")


def space(n=4, seed=0):
  """log r [n], and P [n, n] of no order."""
  rng = np.random.default_rng(seed)
  theta, upper = rng.normal(size=n), np.triu(rng.random((n, n)), 1)
  log_r = theta - np.logaddexp.reduce(theta)
  return log_r, upper + np.tril(1 - upper.T, -1) + np.eye(n) / 2


def minimised(rows, log_r, pairs, weights, steps=60):
  """log pi [n] where sum of weights * rows(logp of pairs, reference of pairs) is least, by Newton's method."""
  pairs = np.asarray(pairs)

  def objective(theta):
    logp = jax.nn.log_softmax(theta)
    return jnp.sum(weights * rows(logp[pairs][..., None], jnp.asarray(log_r)[pairs][..., None])) + 1e-9 * theta @ theta

  step = jax.jit(lambda t: t - jnp.linalg.solve(jax.hessian(objective)(t), jax.grad(objective)(t)))
  theta = jnp.asarray(log_r)
  for _ in range(steps):
    theta = step(theta)
  return np.asarray(jax.nn.log_softmax(theta))


def every_pair(n=4):
  return [(i, j) for i in range(n) for j in range(n)]


def test_dpos_optimum_on_transitive_preferences_is_the_reference_tilted_by_the_scores():
  log_r, _ = space()
  scores, b = np.array([0.3, -0.2, 0.5, 0.1]), 0.5
  p = np.array([1 / (1 + np.exp(scores[j] - scores[i])) for i, j in every_pair()])
  rows = lambda logp, ref: losses.dpo(logp, ref, p, jnp.ones_like(logp), b=b)
  found = minimised(rows, log_r, every_pair(), np.ones(16))
  expected = log_r + scores / b
  np.testing.assert_allclose(found, expected - np.logaddexp.reduce(expected), atol=1e-6)


@pytest.mark.parametrize("loss", ["ipo", "ipo_against", "inpo", "onpo", "sppo"])
def test_squared_losses_have_their_closed_optima(loss):
  """Each on all pairs with the sampler's weights: the mirror step or best response that the paper derives from it."""
  log_r, p = space()
  tau, eta = 0.6, 0.9
  previous = np.log([0.1, 0.4, 0.3, 0.2])
  mu = np.exp(previous)  # of which opponents, or pairs, are drawn
  q = p @ mu
  i, j = np.array(every_pair()).T
  normal = lambda z: z - np.logaddexp.reduce(z)
  of = lambda x: np.asarray(x)[np.array(every_pair())][..., None]
  uniform, drawn = np.ones(16), mu[i] * mu[j]
  ones = lambda logp: jnp.ones_like(logp)
  # Labels are of the pair alone, and no policy has all their contrasts: of pairs that mu draws, the best fit has
  # those of the win rates against mu.
  weights, labels = drawn, p[i, j]
  if loss == "ipo":  # the best response to mu
    rows = lambda logp, ref: losses.ipo(logp, ref, labels, ones(logp), b=tau)
    expected = normal(log_r + q / tau)
  elif loss == "ipo_against":
    rows = lambda logp, ref: losses.ipo_against(logp, ref, np.stack([q[i], q[j]], 1), ones(logp), b=tau)
    weights, expected = uniform, np.asarray(games.best_response(q, log_r, tau))
  elif loss == "inpo":
    rows = lambda logp, ref: losses.inpo(logp, ref, of(previous), labels, ones(logp), eta=eta, b=tau)
    expected = normal((tau / eta) * log_r + (1 - tau / eta) * previous + q / eta)
  elif loss == "onpo":
    rows = lambda logp, ref: losses.onpo(logp, of(previous), labels, ones(logp), eta=eta)
    expected = normal(previous + eta * q)
  else:
    rows = lambda logp, ref: losses.sppo(logp, of(previous), np.stack([q[i], q[j]], 1), ones(logp), b=1 / eta)
    found = minimised(rows, log_r, every_pair(), uniform)
    d = found - previous  # single responses: the normaliser is fitted too, and not exactly
    np.testing.assert_allclose(d - d.mean(), eta * (q - q.mean()), atol=0.05)
    return
  np.testing.assert_allclose(minimised(rows, log_r, every_pair(), weights), expected, atol=1e-6)


def test_coin_tosses_have_the_gradient_of_the_probability():
  rng = np.random.default_rng(0)
  logp, reference = rng.normal(size=(2, 6, 2, 3))
  p, mask = rng.random(6), np.ones((6, 2, 3))
  for loss in (functools.partial(losses.ipo, b=0.3), functools.partial(losses.dpo, b=0.4)):
    grad = lambda p: rows_and_grad(loss, logp, reference, np.asarray(p), mask)[1]
    tossed = p[:, None, None] * grad(np.ones(6)) + (1 - p)[:, None, None] * grad(np.zeros(6))
    np.testing.assert_allclose(grad(p), tossed, atol=1e-12)


def test_dpo_at_no_contrast_is_log_two_and_smoothing_mixes_both_orders():
  rng = np.random.default_rng(0)
  logp, reference = rng.normal(size=(2, 5, 2, 3))
  mask = np.ones((5, 2, 3))
  np.testing.assert_allclose(losses.dpo(logp, logp, np.ones(5), mask, b=0.3), np.log(2), atol=1e-12)
  of = lambda p, **kw: np.asarray(losses.dpo(logp, reference, np.full(5, p), mask, b=0.3, **kw))
  np.testing.assert_allclose(of(1.0, smoothing=0.2), 0.8 * of(1.0) + 0.2 * of(0.0), atol=1e-12)
  swapped = losses.dpo(logp[:, ::-1], reference[:, ::-1], np.full(5, 0.0), mask, b=0.3)
  np.testing.assert_allclose(swapped, of(1.0), atol=1e-12)


def test_a_better_order_of_a_list_has_a_lower_loss_and_two_are_dpo_weighted():
  quality = np.array([[0.9, 0.5, 0.1]])
  mask = np.ones((1, 3, 1))
  of = lambda d: float(losses.listwise(np.array(d).reshape(1, 3, 1), np.zeros((1, 3, 1)), quality, mask, b=1.0)[0])
  assert of([3.0, 2.0, 1.0]) < of([2.0, 3.0, 1.0]) < of([1.0, 2.0, 3.0])
  pair = np.array([[[0.7], [0.2]]])
  listed = losses.listwise(pair, np.zeros_like(pair), quality[:, :2], np.ones_like(pair), b=0.5)
  weight = (2**0.9 - 2**0.5) * (1 - 1 / np.log2(3))
  plain = losses.dpo(pair, np.zeros_like(pair), np.ones(1), np.ones_like(pair), b=0.5)
  np.testing.assert_allclose(listed, weight * plain, atol=1e-12)


def test_distillation_ends_at_its_teacher_and_imitation_at_its_text():
  rng = np.random.default_rng(0)
  z, reversed_ = rng.normal(size=(2, 3, 4, 7))
  mask = np.ones((3, 4))
  teacher, _ = distillation.contrastive_teacher(jnp.asarray(z), jnp.asarray(reversed_), 10.0)
  f = functools.partial(distillation.aligndistil, b=0.1, scale=10.0)
  rows, grad = rows_and_grad(f, np.asarray(teacher) + 2, z, reversed_, mask)
  np.testing.assert_allclose(rows, 0, atol=1e-12)
  np.testing.assert_allclose(grad, 0, atol=1e-12)
  text = rng.integers(7, size=(3, 4))
  rows, _ = rows_and_grad(functools.partial(distillation.superhf, b=0.3), z, z, text, mask)
  expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(z)), text[..., None], -1)[..., 0].mean(1)
  np.testing.assert_allclose(rows, expected, atol=1e-12)  # at the base there is no KL
  wins = np.array([[[0.5, 0.9, 0.4], [0.1, 0.5, 0.3], [0.6, 0.7, 0.5]]])
  assert distillation.best_of(wins).tolist() == [0]


@pytest.mark.parametrize("name", ["aligndistil", "superhf"])
def test_losses_on_logits_are_of_rows_alone_read_no_padding_and_teach_the_student_only(name):
  rng = np.random.default_rng(0)
  z, other, another = rng.normal(size=(3, 4, 3, 5))
  mask = np.array([[1.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]])  # an empty response among them
  if name == "aligndistil":
    f = lambda z, other, m: distillation.aligndistil(z, other, another[: len(m)], m, b=0.1, scale=10.0)
  else:
    f = lambda z, other, m: distillation.superhf(z, other, np.ones(m.shape, int), m, b=0.3)
  of = jax.jit(jax.value_and_grad(lambda z, other, m: jnp.sum(f(z, other, m)), argnums=(0, 1)))
  value, (grad, none) = of(z, other, mask)
  assert np.isfinite(value)
  assert np.abs(grad[0]).min() > 0
  np.testing.assert_array_equal(none, 0)
  np.testing.assert_array_equal(np.asarray(grad)[mask == 0], 0)
  spoilt = np.where(mask[..., None] > 0, z, np.nan), np.where(mask[..., None] > 0, other, np.nan)
  again, (grad_again, _) = of(*spoilt, mask)
  np.testing.assert_allclose(again, value, atol=1e-12)
  np.testing.assert_allclose(grad_again, grad, atol=1e-12)
  rows = f(z, other, mask)
  np.testing.assert_allclose(
    np.concatenate([rows[:3], f(z[:3], other[:3], mask[:3])]), np.tile(rows[:3], 2), atol=1e-12
  )
  assert float(rows[2]) == 0


def test_apos_momentum_extrapolates_and_gives_no_gradient():
  logp, previous = np.array([[-1.0, -2.0]]), np.array([[-1.5, -1.0]])
  np.testing.assert_allclose(losses.extrapolated(logp, previous, 0.5), [[-0.75, -2.5]])
  np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(losses.extrapolated(x, previous, 0.5)))(jnp.asarray(logp)), 0)
