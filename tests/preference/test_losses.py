"""Preference losses: recorded values and gradients, closed-form optima, and what a sum of micro-batches must be."""

import functools
import itertools
import pathlib

import jax
from jax import P
from jax import numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.mesh import BATCH
from research.metrics import add
from research.preference import distillation, games, losses
from tests import small

GOLDEN = np.load(pathlib.Path(__file__).parent / "goldens" / "losses.npz")


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def tokens(*responses):
  """Sequence log-probabilities [batch] each -> [batch, responses, 1]: responses of one token."""
  return np.stack(responses, axis=1)[..., None]


def rows_and_grad(loss, logp, *args, **kwargs):
  """(rows [batch], gradient of their sum by logp)."""
  f = lambda logp: (lambda rows: (jnp.sum(rows), rows))(loss(logp, *args, **kwargs))
  grad, rows = jax.jit(jax.grad(f, has_aux=True))(jnp.asarray(logp))
  return np.asarray(rows), np.asarray(grad)


CASES_A = {
  "opt0": functools.partial(losses.dpo, b=0.1),
  "opt1": functools.partial(losses.dpo, b=0.1, smoothing=0.1),
  "opt2": functools.partial(losses.dpo, b=0.5, smoothing=0.3),
  "opt3": functools.partial(losses.ipo, b=0.1),
  "opt4": functools.partial(losses.ipo, b=0.7),
}


@pytest.mark.parametrize("name", CASES_A)
def test_dpo_and_ipo_are_the_published_ones(name):
  g = lambda what: GOLDEN[f"5a/{what}"]
  logp = tokens(g("policy_chosen_logps"), g("policy_rejected_logps"))
  reference = tokens(g("ref_chosen_logps"), g("ref_rejected_logps"))
  rows, grad = rows_and_grad(CASES_A[name], logp, reference, np.ones(6), np.ones_like(logp))
  np.testing.assert_allclose(rows, g(f"{name}/losses"), atol=1e-10)
  expected = tokens(g(f"{name}/grad_policy_chosen"), g(f"{name}/grad_policy_rejected"))
  np.testing.assert_allclose(grad / 6, expected, atol=1e-10)  # recorded of the mean


@pytest.mark.parametrize(
  ("name", "loss"),
  [
    ("sigmoid/beta0.1", functools.partial(losses.dpo, b=0.1)),
    ("ipo/beta0.4", functools.partial(losses.ipo, b=0.4, reduce="mean")),
  ],
)
def test_a_trainers_losses_are_met_from_logits(name, loss):
  ids, mask = GOLDEN["5b/input_ids"], GOLDEN["5b/completion_mask"]
  pairs = lambda x: jnp.stack(jnp.split(x, 2), axis=1)  # the trainer stacks chosen over rejected
  shifted = jnp.asarray(mask[:, 1:], jnp.float64)  # no completion starts at 0: no token of it is lost

  def of(logits):
    logp = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    return jnp.take_along_axis(logp, ids[:, 1:, None], axis=-1)[..., 0]

  reference = of(jnp.asarray(GOLDEN["5b/ref_logits"], jnp.float64))

  @jax.jit
  @jax.value_and_grad
  def total(logits):
    return jnp.mean(loss(pairs(of(logits)), pairs(reference), jnp.ones(len(ids) // 2), pairs(shifted)))

  value, grad = total(jnp.asarray(GOLDEN["5b/logits"], jnp.float64))
  np.testing.assert_allclose(value, GOLDEN[f"5b/{name}/loss"], atol=1e-10)
  np.testing.assert_allclose(grad, GOLDEN[f"5b/{name}/grad_logits"], atol=1e-10)


@pytest.mark.parametrize(
  ("name", "b", "weights"),
  [("kl_positive", 0.1, (1, 1)), ("kl_clamped_to_zero", 0.1, (1, 1)), ("weighted", 0.6, (1.33, 0.7))],
)
def test_kto_is_the_published_one_with_its_baseline(name, b, weights):
  g = lambda what: GOLDEN[f"5c/{what}"]
  both = lambda what: np.concatenate([g(what.format("chosen")), g(what.format("rejected"))])
  baseline = losses.kto_baseline(g("policy_KL_token_logps"), g(f"{name}/ref_KL_token_logps"), g("KL_mask"))
  np.testing.assert_allclose(max(float(baseline.value), 0), g(f"{name}/z_KL"), atol=1e-7)
  desirable = np.repeat([1, 0], [4, 3])
  loss = functools.partial(losses.kto, b=b, weights=weights)
  args = (both("ref_{}_token_logps"), desirable, both("{}_mask"), baseline.value)
  rows, grad = rows_and_grad(loss, both("policy_{}_token_logps"), *args)
  np.testing.assert_allclose(rows, g(f"{name}/losses_float64"), atol=1e-7)
  expected = np.concatenate([g(f"{name}/grad_chosen_seq"), g(f"{name}/grad_rejected_seq")])
  np.testing.assert_allclose(grad[:, 0] / 7, expected, atol=1e-7)


def test_bco_is_the_published_one_and_its_shift_runs_over_batches():
  running = None
  for step in range(3):
    g = lambda what: GOLDEN[f"5d/plain/step{step}/{what}"]
    both = lambda what: np.concatenate([g(what + "_chosen"), g(what + "_rejected")])[:, None]
    logp, reference = both("policy"), both("ref")
    here = losses.bco_shift(logp, reference, np.ones_like(logp), b=0.1)
    running = here if running is None else running + here
    np.testing.assert_allclose(running.value, g("delta"), atol=1e-7)  # kept in float32 there
    desirable = np.repeat([1, 0], [len(g("policy_chosen")), len(g("policy_rejected"))])
    loss = functools.partial(losses.bco, b=0.1)
    rows, grad = rows_and_grad(loss, logp, reference, desirable, np.ones_like(logp), g("delta"))
    np.testing.assert_allclose(rows, g("losses"), atol=1e-10)
    np.testing.assert_allclose(grad / len(rows), both("grad"), atol=1e-10)


@pytest.mark.parametrize("beta", [0.001, 0.05])
def test_sppo_is_the_published_one(beta):
  g = lambda what: GOLDEN[f"5e/{what}"]
  logp = tokens(g("policy_chosen_logps"), g("policy_rejected_logps"))
  reference = tokens(g("ref_chosen_logps"), g("ref_rejected_logps"))
  wins = np.stack([g("chosen_probs_win"), g("chosen_probs_lose")], axis=1)
  rows, grad = rows_and_grad(functools.partial(losses.sppo, b=beta), logp, reference, wins, np.ones_like(logp))
  np.testing.assert_allclose(rows, g(f"sppo/beta{beta}/losses"), rtol=1e-10)
  expected = tokens(g(f"sppo/beta{beta}/grad_chosen"), g(f"sppo/beta{beta}/grad_rejected"))
  np.testing.assert_allclose(grad / 6, expected, rtol=1e-9)


@pytest.mark.parametrize(
  ("name", "b", "alpha", "loss"),
  [
    ("sigmoid", 0.1, 0.01, losses.dpo),
    ("alpha0", 0.1, 0.0, losses.dpo),
    ("ipo_sum", 0.3, 0.005, losses.ipo),
  ],
)
def test_xpo_is_the_published_one_and_its_bonus_is_positive(name, b, alpha, loss):
  g = lambda what: GOLDEN[f"5f/{what}"]
  logp = np.stack([g("model_logps_on_model_data"), g("model_logps_on_ref_data")], axis=1)
  reference = np.stack([g("ref_logps_on_model_data"), g("ref_logps_on_ref_data")], axis=1)
  mask = np.stack([g("model_mask"), g("ref_mask")], axis=1)
  f = functools.partial(losses.xpo, b=b, alpha=alpha, loss=loss)
  rows, grad = rows_and_grad(f, logp, reference, g("model_is_chosen").astype(float), mask)
  np.testing.assert_allclose(rows.mean(), g(f"{name}/loss"), atol=1e-10)
  expected = np.stack([g(f"{name}/grad_model_data_tokens"), g(f"{name}/grad_ref_data_tokens")], axis=1)
  np.testing.assert_allclose(grad / len(rows), expected * mask, atol=1e-10)  # recorded without the mask
  plain, without = rows_and_grad(functools.partial(f, alpha=0.0), logp, reference, g("model_is_chosen"), mask)
  np.testing.assert_allclose(grad[:, 1] - without[:, 1], alpha * mask[:, 1], atol=1e-12)  # descent lowers log pi(y_1)


@pytest.mark.parametrize("b", [0.1, 1.0])
def test_online_ipo_against_an_opponent_is_the_official_one(b):
  move = lambda x: np.moveaxis(x, 2, 1).reshape(10, 2)  # [row, response, chunk]: two pairs a row
  logp, reference = (move(GOLDEN[f"5i/{name}"])[..., None] for name in ("logps", "ref_logps"))
  wins = GOLDEN["5i/prefs"].reshape(10, 2)  # [row, chunk, response]
  rows, grad = rows_and_grad(functools.partial(losses.ipo_against, b=b), logp, reference, wins, np.ones_like(logp))
  np.testing.assert_allclose(rows.mean(), GOLDEN[f"5i/beta{b}/loss"], rtol=1e-10)
  np.testing.assert_allclose(grad[..., 0] / 10, move(GOLDEN[f"5i/beta{b}/grad_logps"]), atol=1e-10)


@pytest.mark.parametrize("name", ["online_ipo_hard", "online_ipo_soft", "inpo", "onpo"])
def test_pair_losses_of_self_play_are_their_formulas(name):
  logp, reference, previous = (
    tokens(GOLDEN[f"5i/pairs/{x}_w"], GOLDEN[f"5i/pairs/{x}_l"]) for x in ("logp", "ref", "prev")
  )
  soft, hard = GOLDEN["5i/pairs/P_w_beats_l"], np.ones(5)
  mask = np.ones_like(logp)
  f, args = {
    "online_ipo_hard": (functools.partial(losses.ipo, b=0.2), (reference, hard)),
    "online_ipo_soft": (functools.partial(losses.ipo, b=0.2), (reference, soft)),
    "inpo": (functools.partial(losses.inpo, eta=0.5, b=0.2), (reference, previous, hard)),
    "onpo": (functools.partial(losses.onpo, eta=0.5), (previous, hard)),
  }[name]
  rows, grad = rows_and_grad(f, logp, *args, mask)
  np.testing.assert_allclose(rows, GOLDEN[f"5i/own/{name}/losses"], rtol=1e-10)
  expected = tokens(GOLDEN[f"5i/own/{name}/grad_w"], GOLDEN[f"5i/own/{name}/grad_l"])
  scale = np.linalg.norm(grad) / np.linalg.norm(expected)  # of the sum, or of the mean of 5
  assert scale == pytest.approx(1, abs=1e-9) or scale == pytest.approx(5, abs=1e-9)
  np.testing.assert_allclose(grad / scale, expected, rtol=1e-9)


# vocabulary, length, tau
MODELS = {"V3_L2": (3, 2, 0.1), "V2_L3": (2, 3, 0.3), "V3_L1": (3, 1, 0.2)}


def sequence_logps(tables, vocab, length):
  """Token log-probs [vocab^length, length] of all strings, in itertools.product's order, from prefix tables."""
  strings = np.array(list(itertools.product(range(vocab), repeat=length)))
  columns = []
  for t in range(length):
    prefix = strings[:, :t] @ (vocab ** np.arange(t)[::-1])
    columns.append(jax.nn.log_softmax(tables[t], axis=-1)[prefix.astype(int), strings[:, t]])
  return jnp.stack(columns, axis=1)


@pytest.mark.parametrize("name", MODELS)
def test_the_policy_gradient_of_sequences_is_the_enumerated_one_and_token_local_kl_is_not(name):
  vocab, length, tau = MODELS[name]
  g = lambda what: GOLDEN[f"5g/{name}/{what}"]
  tables = [jnp.asarray(g(f"theta_level{t}"), jnp.float64) for t in range(length)]
  reference = g("ref_token_logps")
  wins = g("P") @ np.exp(g("mixture_logp_tokenlevel"))
  mask = np.ones_like(reference)

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=0)
  def expected_loss(tables, weights):
    logp = sequence_logps(tables, vocab, length)
    return jnp.sum(weights * losses.nash_md(logp, reference, wins, mask, b=tau))

  weights = jnp.exp(jnp.sum(sequence_logps(tables, vocab, length), axis=1))
  value, grads = expected_loss(tables, weights)
  assert -float(value) == pytest.approx(float(g("tokenmix/objective_J")) - 0.5, abs=1e-10)
  for t, grad in enumerate(grads):
    np.testing.assert_allclose(grad, g(f"tokenmix/grad_minusJ_level{t}"), atol=1e-10)
  if length > 1:
    assert np.abs(grads[0] - g("tokenmix/trl_surrogate_expected_grad_level0")).max() > 1e-3


@pytest.mark.parametrize(("path", "scale"), [("off_policy", 10.0), ("on_policy", 15.0)])
@pytest.mark.parametrize(("reduce", "what"), [("mean", "len_norm"), ("sum", "sum")])
def test_aligndistil_is_the_published_one(path, scale, reduce, what):
  g = lambda name: GOLDEN[f"5h/{name}"]
  case = f"{path}/aligndistil/temp1.0/"
  args = [jnp.asarray(g(x)) for x in ("dpo_teacher_logits", "reverse_dpo_or_ref_logits", "mask")]
  teacher, weight = distillation.contrastive_teacher(*args[:2], scale)
  np.testing.assert_allclose(teacher, g(case + "final_teacher_logits"), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(weight[..., 0], g(case + "weight"), rtol=1e-5)
  f = functools.partial(distillation.aligndistil, b=0.1, scale=scale, reduce=reduce)
  rows, grad = rows_and_grad(f, g("student_logits"), *args)
  np.testing.assert_allclose(rows.mean(), g(case + f"loss_{what}"), rtol=1e-5)
  expected = g(case + f"grad_student_{what}")
  np.testing.assert_allclose(grad / 2, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


# -- optima on a space small enough to enumerate --------------------------------------------------------------------


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


# -- every loss alike -----------------------------------------------------------------------------------------------


def table(reduce="sum"):
  """name -> loss of (logp, reference, wins [batch, 2], mask), all of [batch, 2, length], on the rows of a batch.

  For those with a mean over the batch: (the Mean of a part, loss of its value and the same).
  """
  first = lambda a: a[:, 0]
  pair = lambda f, **kw: lambda x, r, w, m: f(x, r, first(w), m, reduce=reduce, **kw)
  plain = {
    "dpo": pair(losses.dpo, b=0.3, smoothing=0.1),
    "ipo": pair(losses.ipo, b=0.3),
    "ipo_against": lambda x, r, w, m: losses.ipo_against(x, r, w, m, b=0.3, reduce=reduce),
    "sppo": lambda x, r, w, m: losses.sppo(x, r, w, m, b=0.5, reduce=reduce),
    "inpo": lambda x, r, w, m: losses.inpo(x, r, 0.9 * r, first(w), m, eta=0.5, b=0.2, reduce=reduce),
    "onpo": pair(losses.onpo, eta=0.5),
    "nash_md": lambda x, r, w, m: losses.nash_md(first(x), first(r), first(w), first(m), b=0.2),
    "xpo": pair(losses.xpo, b=0.3, alpha=0.1),
    "apo": lambda x, r, w, m: losses.dpo(x, losses.extrapolated(r, 0.9 * r, 0.5), first(w), m, b=0.3, reduce=reduce),
    "listwise": lambda x, r, w, m: losses.listwise(x, r, w, m, b=0.3, reduce=reduce),
  }
  with_mean = {
    "kto": (
      lambda x, r, w, m: losses.kto_baseline(x[:, 1], r[:, 1], m[:, 1], reduce=reduce),
      lambda z, x, r, w, m: losses.kto(first(x), first(r), first(w) > 0.5, first(m), z, b=0.3, reduce=reduce),
    ),
    "bco": (
      lambda x, r, w, m: losses.bco_shift(first(x), first(r), first(m), b=0.3, reduce=reduce),
      lambda z, x, r, w, m: losses.bco(first(x), first(r), first(w) > 0.5, first(m), z, b=0.3, reduce=reduce),
    ),
  }
  none = lambda x, r, w, m: losses.over_rows(jnp.zeros(len(x)))
  ignoring = lambda f: lambda z, *args: f(*args)
  return {name: (none, ignoring(f)) for name, f in plain.items()} | with_mean


def data(rows=8, length=5, seed=0):
  rng = np.random.default_rng(seed)
  logp, reference = -rng.random((2, rows, 2, length)) * 3
  mask = (np.arange(length) < rng.integers(1, length + 1, size=(rows, 2, 1))).astype(float)
  return logp, reference, rng.random((rows, 2)), mask


@functools.cache
def compiled(name, reduce):
  shared, loss = table(reduce)[name]

  def total(logp, rest, z):
    mean = losses.over_rows(loss(z, logp, *rest))
    return mean.total, mean

  return jax.jit(lambda *part: shared(*part)), jax.jit(jax.grad(total, has_aux=True))


def summed(name, parts, reduce="sum"):
  """(loss, gradient by logp) of sum / weight over all parts, the mean they share made in a first pass."""
  shared, grad = compiled(name, reduce)
  z = sum((shared(*part) for part in parts[1:]), shared(*parts[0])).value
  grads, means = zip(*(grad(logp, rest, z) for logp, *rest in parts), strict=True)
  mean = functools.reduce(add, ({"loss": m} for m in means))["loss"]
  return np.asarray(mean.value), np.concatenate([np.asarray(g) for g in grads]) / float(mean.weight)


@pytest.mark.parametrize("name", table())
def test_micro_batches_add_up_to_the_batch(name):
  whole = data()
  parts = [tuple(x[at : at + size] for x in whole) for at, size in ((0, 2), (2, 6))]
  for got, want in zip(summed(name, parts), summed(name, [whole]), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_rows_that_are_padding_move_neither_ktos_baseline_nor_bcos_shift():
  logp, reference, _, mask = (x[:, 0] if x.ndim == 3 else x for x in data())
  weights = np.repeat([1.0, 0.0], [5, 3])
  for f in (losses.kto_baseline, functools.partial(losses.bco_shift, b=0.3)):
    kept, whole = f(logp[:5], reference[:5], mask[:5]).value, f(logp, reference, mask).value
    np.testing.assert_allclose(f(logp, reference, mask, weights=weights).value, kept, rtol=1e-12)
    assert abs(float(whole - kept)) > 1e-3


def test_a_shift_of_each_micro_batch_would_change_the_gradients():
  whole = data()
  parts = [tuple(x[at : at + 4] for x in whole) for at in (0, 4)]
  apart = np.concatenate([summed("bco", [part])[1] for part in parts]) / 2
  assert np.abs(apart - summed("bco", [whole])[1]).max() > 1e-4


@pytest.mark.parametrize("name", ["dpo", "nash_md", "kto", "bco", "listwise"])
def test_a_sharded_batch_is_the_whole_one(name):
  whole = data()
  want = summed(name, [whole])
  with small.use(small.MeshConfig(2, 2, 1, "replicated"), devices=4):
    mesh = jax.sharding.get_mesh()
    place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, P(BATCH, *[None] * (x.ndim - 1))))
    got = jax.block_until_ready(summed(name, [tuple(map(place, whole))]))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(("name", "reduce"), [*((name, "sum") for name in table()), ("dpo", "mean"), ("bco", "mean")])
def test_empty_responses_and_what_stands_in_padding_change_nothing(name, reduce):
  logp, reference, wins, mask = data(rows=4)
  mask[0, 0], mask[1] = 0, 0
  value, grad = summed(name, [(np.where(mask > 0, logp, 0), np.where(mask > 0, reference, 0), wins, mask)], reduce)
  assert np.isfinite(value)
  assert np.isfinite(grad).all()
  spoilt = [np.where(mask > 0, x, np.nan) for x in (logp, reference)]
  again = summed(name, [(*spoilt, wins, mask)], reduce)
  np.testing.assert_allclose(again[0], value, atol=1e-12)
  np.testing.assert_allclose(again[1], grad, atol=1e-12)
  # on the left or on the right, and however much
  order = np.argsort(mask, axis=-1, kind="stable")
  padded = [np.pad(np.take_along_axis(x, order, -1), ((0, 0), (0, 0), (2, 0))) for x in (logp, reference, mask)]
  if name != "nash_md":  # its surrogate knows an order, which this one keeps; checked by enumeration
    np.testing.assert_allclose(summed(name, [(*padded[:2], wins, padded[2])], reduce)[0], value, atol=1e-12)


@pytest.mark.parametrize("name", ["dpo", "sppo", "nash_md", "kto"])
def test_bfloat16_log_probabilities_give_float32_losses(name):
  whole = data()
  narrow = tuple(jnp.asarray(x, jnp.bfloat16) for x in whole)
  shared, loss = table()[name]
  rows = loss(shared(*narrow).value, *narrow)
  assert rows.dtype == jnp.float32
  np.testing.assert_allclose(rows, loss(shared(*whole).value, *whole), rtol=0.1, atol=0.1)


def test_only_the_policy_gets_gradients():
  logp, reference, wins, mask = data()
  for shared, loss in table().values():
    total = lambda reference, wins: jnp.sum(
      loss(shared(logp, reference, wins, mask).value, logp, reference, wins, mask)
    )
    for grad in jax.grad(total, argnums=(0, 1))(jnp.asarray(reference), jnp.asarray(wins)):
      np.testing.assert_array_equal(grad, 0)


def test_sum_and_mean_are_what_a_hand_computes():
  logp = np.array([[-1.0, -2.0, -3.0]])
  mask = np.array([[1.0, 1.0, 0.0]])
  assert float(losses.log_prob(logp, mask, "sum")[0]) == -3
  assert float(losses.log_prob(logp, mask, "mean")[0]) == -1.5
  with pytest.raises(UserError, match="reduce=token: use sum or mean"):
    losses.log_prob(logp, mask, "token")
  with pytest.raises(UserError, match="mask="):
    losses.log_prob(logp, mask[:, :2])
  with pytest.raises(UserError, match="logp="):
    losses.dpo(logp, logp, np.ones(1), mask, b=0.1)
  with pytest.raises(UserError, match="preference="):
    losses.ipo_against(np.zeros((3, 2, 1)), np.zeros((3, 2, 1)), np.ones(3), np.ones((3, 2, 1)), b=1.0)
