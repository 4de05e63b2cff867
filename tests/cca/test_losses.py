"""Losses on log-probabilities: the released code's numbers, and what they are by hand."""

import json
import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from experiments.cca import losses

GOLDENS = pathlib.Path(__file__).parent / "goldens"
# what each recorded setting is called here; without a share of null classes the first of the two
# programs, against its own name, computes the unlearning loss
SETTINGS = {
  "llamagen": {"LA": ("cca", True), "LB": ("cca", True), "LC_uncond0": ("unlearning", False), "LD_dpo": ("dpo", True),
               "LE_unlearn": ("unlearning", True)},
  "var": {"LA": ("cca", True), "LB": ("cca", True), "LC_uncond0": ("cca", False), "LD_dpo": ("dpo", True),
          "LE_unlearn": ("unlearning", True)},
}  # fmt: skip


@pytest.mark.parametrize(("program", "setting"), [(p, s) for p in SETTINGS for s in SETTINGS[p]])
def test_losses_and_gradients_are_those_of_the_released_code(program, setting):
  golden = np.load(GOLDENS / f"cca_loss_{program}.npz")
  about = json.loads((GOLDENS / "settings.json").read_text())[f"cca_loss_{program}"][setting]
  name, masked = SETTINGS[program][setting]
  null = golden["TBM"] if about["uncond_ratio"] else np.zeros_like(golden["TBM"])
  labels, others, same = losses.negatives(jnp.asarray(golden["labels_before_drop"]), null, 1000)
  assert labels.tolist() == golden[f"{setting}/labels_used"].tolist()
  assert others.tolist() == golden[f"{setting}/shuffled_labels_used"].tolist()
  if f"{setting}/neg_weight" in golden:
    assert same.tolist() == golden[f"{setting}/neg_weight"].tolist()

  def mean(logp, other_logp):
    pos, neg = logp - golden["img_ref_logps"], other_logp - golden["negative_img_ref_logps"]
    options = {"beta": about["beta"], "lam": about["lambda_"], "masked": masked}
    return jnp.mean(losses.rows(name, pos, neg, same, **options))

  value, gradients = jax.value_and_grad(mean, (0, 1))(*(golden[k] for k in ("img_logps", "negative_img_logps")))
  assert float(value) == pytest.approx(float(golden[f"{setting}/loss"]), rel=1e-5)
  for gradient, key in zip(gradients, ("img_logps", "negative_img_logps"), strict=True):
    want = golden[f"{setting}/grad_{key}"]
    assert np.abs(gradient - want).max() <= 1e-4 * np.abs(want).max()


def test_the_first_loss_is_the_logarithm_of_two_once_and_once_by_weight():
  same = jnp.array([False, False, True, False])
  first = float(jnp.mean(losses.at_start("cca", same, beta=0.02, lam=1000.0)))
  assert first == pytest.approx(np.log(2) * (1 + (3 * 1000 + 1) / 4) / 1000, rel=1e-6)
  none = jnp.zeros(4, bool)
  assert float(losses.at_start("cca", none, beta=0.02, lam=1000.0)[0]) == pytest.approx(0.6938, abs=1e-4)
  assert float(losses.at_start("dpo", none, beta=0.1, lam=1.0)[0]) == pytest.approx(np.log(2))
  assert float(losses.at_start("nca", none, beta=0.1, lam=1.0)[0]) == pytest.approx(2 * np.log(2))
  assert float(losses.at_start("unlearning", none, beta=0.1, lam=5.0)[0]) == 0


def test_labels_of_neighbours_go_around_and_null_rows_lose_both():
  labels, others, same = losses.negatives(jnp.array([3, 3, 1, 2]), jnp.array([False, False, False, True]), 10)
  assert labels.tolist() == [3, 3, 1, 10]
  assert others.tolist() == [3, 1, 2, 10]
  assert same.tolist() == [True, False, False, True]


@pytest.mark.parametrize("name", losses.LOSSES)
def test_likelihood_under_the_right_class_is_pulled_up_and_under_another_down(name):
  f = lambda pos, neg: losses.rows(name, pos, neg, jnp.zeros(1, bool), beta=0.1, lam=2.0)[0]
  up, down = jax.grad(f, (0, 1))(jnp.zeros(1), jnp.zeros(1))
  assert float(up[0]) < 0 < float(down[0])
  up, down = jax.grad(lambda p, n: losses.rows("cca", p, n, jnp.ones(1, bool), beta=0.1, lam=2.0)[0], (0, 1))(
    jnp.zeros(1), jnp.zeros(1)
  )
  assert float(up[0]) == float(down[0]) < 0


@pytest.mark.parametrize("name", ["cca", "dpo", "nca"])
def test_gaps_of_any_size_give_finite_losses_and_gradients(name):
  gaps = jnp.array([-1e4, -1.0, 0.0, 1.0, 1e4], jnp.float32)
  f = lambda pos, neg: jnp.sum(losses.rows(name, pos, neg, jnp.zeros(5, bool), beta=1.0, lam=1000.0))
  for tree in (f(gaps, gaps[::-1]), *jax.grad(f, (0, 1))(gaps, gaps[::-1])):
    assert bool(jnp.isfinite(tree).all())
