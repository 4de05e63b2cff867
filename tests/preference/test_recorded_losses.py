"""Every other loss of the public trainers: what the library has, by its own functions, and the rest as what it is.

A loss that the library does not offer is a formula of its log-ratios here, so that masks, lengths and logits are met
for it too.
"""

import pathlib

import jax
from jax import numpy as jnp
from jax.nn import log_sigmoid, sigmoid
import numpy as np
import pytest

from research.preference import distillation, losses

pytestmark = pytest.mark.usefixtures("float64")

GOLDEN = np.load(pathlib.Path(__file__).parent / "goldens" / "losses.npz")


def token_log_probs(logits, ids):
  """[batch, length - 1] of the ids after the first."""
  logp = jax.nn.log_softmax(logits[:, :-1], axis=-1)
  return jnp.take_along_axis(logp, ids[:, 1:, None], axis=-1)[..., 0]


def pairs(x):
  return jnp.stack(jnp.split(x, 2), axis=1)  # the trainer stacks chosen over rejected


ONE = lambda x: jnp.ones(len(x))


def log_ratios(logp, ref, mask):
  d = losses.log_ratio(logp, ref, mask)
  return d[:, 0], d[:, 1]


def bco_pair(logp, ref, mask, b, shift=0.0):
  """Recorded before the first batch had entered the running mean."""
  of = lambda i, good: losses.bco(logp[:, i], ref[:, i], jnp.full(len(logp), good), mask[:, i], shift, b=b)
  return of(0, 1) + of(1, 0)


def kto_pair(logp, ref, mask, b, baseline=0.0):
  of = lambda i, good: losses.kto(logp[:, i], ref[:, i], jnp.full(len(logp), good), mask[:, i], baseline, b=b)
  return of(0, 1) + of(1, 0)


def of_log_ratios(f):
  return lambda logp, ref, mask, b: f(*log_ratios(logp, ref, mask), b)


def both_smoothed(z, e):
  return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)


def exo(win, lose, b):
  e = np.float64(np.float32(0.1))
  q, z = sigmoid(b * (win - lose)), b * (win - lose)
  return q * (log_sigmoid(z) - np.log1p(-e)) + (1 - q) * (log_sigmoid(-z) - np.log(e))


def aot(logp, ref, mask, b):
  ours, theirs = (jnp.sort(x[:, 0] - x[:, 1]) for x in (losses.log_prob(x, mask) for x in (logp, ref)))
  return both_smoothed(b * (ours - theirs), 0.1)


def discopop(win, lose, b):
  z = b * (win - lose)
  share = sigmoid(z / 0.05)
  return -(1 - share) * log_sigmoid(z) + share * jnp.exp(-z)


def chosen_only(logp, ref, mask, b):
  """Cross-entropy a token: a row's sum over the mean number of tokens."""
  return -losses.log_prob(logp, mask)[:, 0] / jnp.mean(jnp.sum(mask[:, 0], axis=-1))


def long_tails(logp, ref, mask, b):
  """LD-DPO: tokens beyond the shorter one's length weigh half; a mask may be any weight."""
  place = jnp.cumsum(mask, axis=-1)
  shorter = jnp.min(jnp.sum(mask, axis=-1), axis=-1)[:, None, None]
  return losses.dpo(logp, ref, ONE(logp), mask * jnp.where(place <= shorter, 1.0, 0.5), b=b)


def mixed(logp, ref, mask, b):
  terms = (TYPES[name](logp, ref, mask, b) for name in ("sigmoid", "bco_pair", "sft"))
  return sum(weight * term for weight, term in zip((0.8, 0.2, 1.0), terms, strict=True))


TYPES = {
  # the library's own
  "sigmoid": lambda x, r, m, b: losses.dpo(x, r, ONE(x), m, b=b),
  "sigmoid_norm": lambda x, r, m, b: losses.dpo(x, r, ONE(x), m, b=b, reduce="mean"),
  "robust": lambda x, r, m, b: losses.dpo(x, r, ONE(x) * 0.85 / 0.7, m, b=b),  # p = (1 - e) / (1 - 2 e)
  "ipo": lambda x, r, m, b: losses.ipo(x, r, ONE(x), m, b=b, reduce="mean"),
  "sppo_hard": lambda x, r, m, b: 2 * losses.sppo(x, r, jnp.tile(jnp.array([1.0, 0.0]), (len(x), 1)), m, b=b),
  "bco_pair": bco_pair,
  "apo_zero": kto_pair,  # the anchored one: KTO with a baseline of 0
  "sft": chosen_only,
  "ld_alpha": long_tails,
  "mixed_mpo": mixed,
  # of its log-ratios
  "hinge": of_log_ratios(lambda win, lose, b: jax.nn.relu(1 - b * (win - lose))),
  "exo_pair": of_log_ratios(exo),
  "nca_pair": of_log_ratios(
    lambda win, lose, b: -log_sigmoid(b * win) - log_sigmoid(-b * win) / 2 - log_sigmoid(-b * lose) / 2
  ),
  "aot": aot,
  "aot_unpaired": of_log_ratios(lambda win, lose, b: both_smoothed(b * (jnp.sort(win) - jnp.sort(lose)), 0.1)),
  "apo_down": of_log_ratios(lambda win, lose, b: sigmoid(b * win) + 1 - sigmoid(b * (win - lose))),
  "discopop": of_log_ratios(discopop),
  "fdiv_forward_kl": of_log_ratios(lambda win, lose, b: -log_sigmoid(b * (jnp.exp(-lose) - jnp.exp(-win)))),
  "fdiv_js": of_log_ratios(lambda win, lose, b: -log_sigmoid(b * (log_sigmoid(win) - log_sigmoid(lose)))),
  "fdiv_alpha": of_log_ratios(lambda win, lose, b: -log_sigmoid(2 * b * (jnp.exp(-lose / 2) - jnp.exp(-win / 2)))),
}


def recorded(case):
  """(loss type, b) of every loss from logits of a case."""
  names = [name.removeprefix(f"{case}/").removesuffix("/loss").partition("/beta") for name in GOLDEN]
  return [(name, float(b or 0.1)) for name, _, b in names if f"{case}/{name}{_}{b}/loss" in GOLDEN]


def batch(case, names=("logits", "ref_logits", "input_ids", "completion_mask")):
  """Logits twice, ids, and the mask of the log-probabilities of the ids after the first."""
  logits, ref, ids, mask = (GOLDEN[f"{case}/{name}"] for name in names)
  return jnp.asarray(logits, jnp.float64), jnp.asarray(ref, jnp.float64), ids, jnp.asarray(mask[:, 1:], jnp.float64)


def compare(value_and_grad, golden, wide=True):
  # gradients are kept in float32
  tolerance = {"rtol": 1e-7, "atol": 1e-10} if wide else {"rtol": 1e-5, "atol": 1e-8}
  np.testing.assert_allclose(value_and_grad[0], GOLDEN[f"{golden}/loss"], **tolerance)
  np.testing.assert_allclose(value_and_grad[1], GOLDEN[f"{golden}/grad_logits"], **tolerance)


@pytest.mark.parametrize(("name", "b"), recorded("5b"))
def test_every_loss_type_of_a_trainer_is_met_from_logits(name, b):
  logits, ref, ids, mask = batch("5b")

  @jax.value_and_grad
  def total(logits):
    args = pairs(token_log_probs(logits, ids)), pairs(token_log_probs(ref, ids)), pairs(mask), b
    rows = weighted_by_probability(logits, *args) if name == "wpo_weighting" else TYPES[name](*args)
    return jnp.mean(rows)

  golden = f"5b/{name}/beta{b}" if f"5b/{name}/loss" not in GOLDEN else f"5b/{name}"
  compare(total(logits), golden, wide=name != "fdiv_alpha")  # which is in float32 there


def weighted_by_probability(logits, logp, ref, mask, b):
  """WPO: a row weighs exp of its two mean log-probabilities less those of the distributions' squares, at most 1."""
  square = jax.nn.logsumexp(2 * jax.nn.log_softmax(logits[:, :-1], axis=-1), axis=-1)
  share = losses.log_prob(logp - pairs(square), mask, "mean")
  weights = jax.lax.stop_gradient(jnp.minimum(jnp.exp(jnp.sum(share, axis=1)), 1))
  return weights * losses.dpo(logp, ref, ONE(logp), mask, b=b)


@pytest.mark.parametrize(
  ("name", "b", "weights", "clamped"),
  [
    ("trl_kto", 0.1, (1.0, 1.0), True),
    ("trl_kto_weighted", 0.5, (1.0, 1.5), True),
    ("trl_apo_zero_unpaired", 0.2, (1.0, 1.0), False),
  ],
)
def test_kto_is_met_from_logits_and_the_anchored_loss_is_kto_without_a_baseline(name, b, weights, clamped):
  logits, ref, ids, mask = batch("5c/trl")
  other, other_ref, other_ids, other_mask = batch(
    "5c/trl", ("KL_logits", "KL_ref_logits", "KL_input_ids", "KL_completion_mask")
  )
  z = losses.kto_baseline(token_log_probs(other, other_ids), token_log_probs(other_ref, other_ids), other_mask).value
  z = jnp.maximum(z, 0) if clamped else 0.0
  np.testing.assert_allclose(z, GOLDEN[f"5c/{name}/kl"], atol=1e-10)

  @jax.value_and_grad
  def total(logits):
    args = token_log_probs(logits, ids), token_log_probs(ref, ids), GOLDEN["5c/trl/label"], mask, z
    return jnp.mean(losses.kto(*args, b=b, weights=weights))

  compare(total(logits), f"5c/{name}")


def test_the_shift_of_bco_knows_no_weights_and_density_ratios_are_rows_weights():
  running, b = None, 0.3
  for step in range(3):
    g = lambda what, step=step: GOLDEN[f"5d/udm_weights/step{step}/{what}"]
    both = lambda what, g=g: jnp.asarray(np.concatenate([g(what + "_chosen"), g(what + "_rejected")]))[:, None]
    logp, ref = both("policy"), both("ref")
    here = losses.bco_shift(logp, ref, jnp.ones_like(logp), b=b)
    running = here if running is None else running + here
    np.testing.assert_allclose(running.value, g("delta"), atol=1e-7)  # kept in float32 there
    good = np.repeat([1, 0], [len(g("policy_chosen")), len(g("policy_rejected"))])
    ratio = np.clip(g("p_desirable") / (1 - g("p_desirable")), 0.5, 10)
    np.testing.assert_allclose(ratio, g("weights"), rtol=1e-6)
    weights = jnp.asarray(np.concatenate([np.ones(good.sum()), g("weights")]))

    def total(logp, ref=ref, good=good, weights=weights, shift=running.value):
      rows = losses.bco(logp, ref, good, jnp.ones_like(logp), shift, b=b)
      return losses.over_rows(rows, weights).total / len(good), rows

    grad, rows = jax.grad(total, has_aux=True)(logp)
    np.testing.assert_allclose(rows * weights, g("losses"), atol=1e-6)
    np.testing.assert_allclose(grad, both("grad"), atol=1e-7)


def rows_and_grads(loss, case):
  """(rows, gradients of their mean by the chosen and the rejected log-probabilities), of responses of one token."""
  policy = jnp.stack([GOLDEN[f"{case}/policy_{x}_logps"] for x in ("chosen", "rejected")], axis=1)[..., None]
  ref = jnp.stack([GOLDEN[f"{case}/ref_{x}_logps"] for x in ("chosen", "rejected")], axis=1)[..., None]

  def total(logp):
    rows = loss(logp, ref, jnp.ones_like(ref))
    return jnp.sum(rows) / len(rows), rows

  grad, rows = jax.grad(total, has_aux=True)(policy)
  return rows, grad[:, 0, 0], grad[:, 1, 0]


def compare_pairs(found, golden):
  for x, what in zip(found, ("losses", "grad_chosen", "grad_rejected"), strict=True):
    np.testing.assert_allclose(x, GOLDEN[f"{golden}/{what}"], rtol=1e-10, atol=1e-10, err_msg=what)


def test_sppo_by_the_preference_within_a_pair_is_met():
  p = jnp.asarray(GOLDEN["5e/chosen_probs"])
  f = lambda x, r, m: losses.sppo(x, r, jnp.stack([p, 1 - p], axis=1), m, b=0.05)
  compare_pairs(rows_and_grads(f, case="5e"), "5e/sppo_single/beta0.05")


def test_ktos_pairs_with_baselines_of_the_batch_itself_are_met():
  def baseline(x, r, m, i):
    return jnp.maximum(losses.kto_baseline(x[:, i], r[:, i], m[:, i]).value, 0)

  def loss(x, r, m):
    row = lambda i, good: losses.kto(x[:, i], r[:, i], jnp.full(len(x), good), m[:, i], baseline(x, r, m, 1 - i), b=0.1)
    return jnp.concatenate([row(0, 1), row(1, 0)])

  def with_gradient(x, r, m):  # the baseline's too, as there
    d = losses.log_ratio(x, r, m)
    z = jnp.maximum(jnp.mean(d, axis=0), 0)
    return jnp.concatenate([1 - sigmoid(0.1 * (d[:, 0] - z[1])), 1 - sigmoid(0.1 * (z[0] - d[:, 1]))])

  np.testing.assert_allclose(rows_and_grads(loss, "5e")[0], GOLDEN["5e/kto_pair/beta0.1/losses"], atol=1e-10)
  rows, *grads = rows_and_grads(with_gradient, "5e")
  compare_pairs([rows, *grads], "5e/kto_pair/beta0.1")


def test_bonuses_on_log_ratios_have_the_gradient_of_those_on_log_probabilities():
  """SE-POPO's XPO adds alpha log pi / r: shifted by a constant. Its own bonus is flattened by a sigmoid."""
  alpha, b = 1e-3, 0.1

  def xpo(x, r, m):
    return losses.xpo(x, r, ONE(x), m, b=b, alpha=alpha) - alpha * losses.log_prob(r[:, 1], m[:, 1])

  def popo(x, r, m):
    d = losses.log_ratio(x[:, 1], r[:, 1], m[:, 1])
    return losses.dpo(x, r, ONE(x), m, b=b) + alpha * (sigmoid(b * d) - 0.5) / b

  for name, loss in (("xpo", xpo), ("popo", popo)):
    compare_pairs(rows_and_grads(loss, case="5f/sepopo"), f"5f/sepopo/{name}")


def test_dpo_without_a_reference_is_met_and_its_rewards():
  found = rows_and_grads(lambda x, r, m: losses.dpo(x, jnp.zeros_like(r), ONE(x), m, b=0.3), case="5a")
  for x, what in zip(found, ("losses", "grad_policy_chosen", "grad_policy_rejected"), strict=True):
    np.testing.assert_allclose(x, GOLDEN[f"5a/opt5/{what}"], atol=1e-10)
  for opt, b in (("opt0", 0.1), ("opt3", 0.1), ("opt4", 0.7), ("opt5", 0.3)):
    for side in ("chosen", "rejected"):
      policy, reference = (GOLDEN[f"5a/{x}_{side}_logps"][:, None] for x in ("policy", "ref"))
      rewards = b * losses.log_ratio(policy, reference, np.ones_like(policy))
      np.testing.assert_allclose(rewards, GOLDEN[f"5a/{opt}/{side}_rewards"], atol=1e-10)


@pytest.mark.parametrize("path", ["off_policy", "on_policy"])
@pytest.mark.parametrize("variant", ["theorem1", "theorem1_contrast", "theorem1_adaptive", "aligndistil"])
def test_every_teacher_of_aligndistil_is_met_token_by_token(path, variant):
  g = lambda what: GOLDEN[f"5h/{path}/{variant}/temp1.0/{what}"]
  student, z, other = (jnp.asarray(GOLDEN[f"5h/{x}_logits"]) for x in ("student", "dpo_teacher", "reverse_dpo_or_ref"))
  mask = GOLDEN["5h/mask"]
  scale = 10.0 if path == "off_policy" else 15.0
  adaptive, w = distillation.contrastive_teacher(z, other, scale)
  teacher = {
    "theorem1": z + 1 * (z - other),  # other + 2 (z - other)
    "theorem1_contrast": z + 2 * (z - other),
    "theorem1_adaptive": other + w * (z - other),
    "aligndistil": adaptive,
  }[variant]
  w = w[..., 0] if variant in ("theorem1_adaptive", "aligndistil") else 2.0
  np.testing.assert_allclose(teacher, g("final_teacher_logits"), rtol=1e-5, atol=1e-5)
  token_loss = lambda student: 0.1 / w * distillation.token_kl(student, teacher)
  np.testing.assert_allclose(token_loss(student), g("token_loss"), rtol=1e-5, atol=1e-6)
  for reduce, what in (("mean", "len_norm"), ("sum", "sum")):
    total = lambda x, reduce=reduce: jnp.mean(losses.log_prob(token_loss(x), mask, reduce))
    value, grad = jax.value_and_grad(total)(student)
    np.testing.assert_allclose(value, g(f"loss_{what}"), rtol=1e-5)
    expected = g(f"grad_student_{what}")
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
