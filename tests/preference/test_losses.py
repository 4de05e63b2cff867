"""Preference losses are the published ones: recorded values and gradients, and their formulas."""

import functools
import itertools
import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from research.preference import distillation, losses
from tests.preference.gradients import rows_and_grad

pytestmark = pytest.mark.usefixtures("float64")

GOLDEN = np.load(pathlib.Path(__file__).parent / "goldens" / "losses.npz")


def tokens(*responses):
  """Sequence log-probabilities [batch] each -> [batch, responses, 1]: responses of one token."""
  return np.stack(responses, axis=1)[..., None]


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
