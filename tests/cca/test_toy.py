"""Exact worlds: what each loss descends to, against closed forms and an optimiser of another kind."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from experiments.cca import toy
from experiments.cca.toy import ToyConfig, World


def optimum(world):
  """The logits that scipy's BFGS finds in float64."""
  with jax.enable_x64(True):
    f = jax.jit(jax.value_and_grad(lambda x: toy.expected_loss(world, x.reshape(world.log_p.shape))))
    call = lambda x: tuple(np.asarray(v, np.float64) for v in f(jnp.asarray(x)))
    found = minimize(call, world.log_start.ravel(), jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 5000})
  return found.x.reshape(world.log_p.shape), float(found.fun)


@pytest.mark.parametrize("beta", [0.25, 0.5, 2.0])
def test_alignment_at_its_exact_lambda_is_guidance_of_scale_one_over_beta(beta):
  world = World(ToyConfig(beta=beta), 0)
  found = toy.measures(world, optimum(world)[0])
  assert found["kl"] < 1e-8
  assert found["scale"] == pytest.approx(1 / beta, abs=0.011)


def test_the_exact_lambda_is_the_normaliser_of_guidance_to_the_power_of_beta():
  cfg = ToyConfig(beta=0.5)
  world = World(cfg, 1)
  p, marginal = np.exp(world.log_p), np.exp(world.log_marginal)
  normaliser = (p**3 / marginal**2).sum(1)  # p (p / p(x))^(1 / beta)
  assert np.exp(world.log_lam()) == pytest.approx(normaliser**0.5, rel=1e-12)
  # there, and nowhere else, the unconstrained optimum of every row is a normalised model
  gap = (np.log(p / marginal) - world.log_lam()[:, None]) / cfg.beta
  assert np.exp(world.log_p + gap).sum(1) == pytest.approx(1, rel=1e-12)


def test_lambda_is_a_dial_from_the_pretrained_model_to_collapse():
  found = [toy.measures(world, optimum(world)[0]) for world in (World(ToyConfig(lam=x), 0) for x in (0.01, 1.0, 3.0))]
  assert found[0]["scale"] < 0.05
  assert [f["scale"] for f in found] == sorted(f["scale"] for f in found)
  assert [f["entropy"] for f in found] == sorted((f["entropy"] for f in found), reverse=True)
  assert World(ToyConfig(lam=3.0), 0).log_lam().tolist() == [np.log(3.0)] * 6


def test_colliding_labels_as_positives_weaken_the_guidance():
  plain, published = (World(ToyConfig(collisions=c), 0) for c in (False, True))
  assert toy.measures(published, optimum(published)[0])["scale"] < toy.measures(plain, optimum(plain)[0])["scale"]


def test_guidance_free_training_ends_at_scale_one_over_beta_less_one():
  world = World(ToyConfig(method="gft", beta=0.25), 0)
  found = toy.measures(world, optimum(world)[0])
  assert found["kl"] < 1e-9
  assert found["scale"] == pytest.approx(3.0, abs=0.011)


def test_the_models_own_samples_as_negatives_end_at_the_data():
  world = World(ToyConfig(method="ddo", beta=1.0), 0)
  assert toy.measures(world, world.log_start)["kl"] > 0.05
  assert toy.measures(world, optimum(world)[0])["kl"] < 1e-9


def test_dpo_finds_differences_between_classes_only():
  world = World(ToyConfig(method="dpo", beta=0.5), 0)
  logits, value = optimum(world)
  p = np.exp(world.log_p)
  win = p[:, None] / (p[:, None] + p[None])  # of class c over class c', for each image
  entropy = -np.mean((p[:, None] * np.log(win)).sum(-1))
  assert value == pytest.approx(entropy, abs=1e-6)
  gap = np.asarray(jax.nn.log_softmax(jnp.asarray(logits))) - world.log_p
  apart = 0.5 * (gap[:, None] - gap[None]) - (world.log_p[:, None] - world.log_p[None])
  assert np.abs(apart).max() < 0.02
  assert toy.measures(world, logits)["kl"] > 0.01  # not guidance: an image's likelihood may move alike in all classes


def test_unlearning_has_a_closed_form_while_no_image_is_more_likely_elsewhere():
  world = World(ToyConfig(method="unlearning", lam=0.02), 0)
  p, marginal = np.exp(world.log_p), np.exp(world.log_marginal)
  left = p - 0.02 * marginal
  assert (left > 0).all()
  want = left / left.sum(1, keepdims=True)
  assert np.abs(np.asarray(jax.nn.softmax(jnp.asarray(optimum(world)[0]))) - want).max() < 1e-6


def test_nca_is_where_its_gradient_vanishes():
  world = World(ToyConfig(method="nca"), 0)
  logits, _ = optimum(world)
  q, gap = np.exp(toy._log_softmax(logits)), toy._log_softmax(logits) - world.log_p
  s = lambda x: 1 / (1 + np.exp(-x))
  p, marginal = np.exp(world.log_p), np.exp(world.log_marginal)
  # derivative in log p_theta of each class's rows, less its mean under p_theta (the constraint)
  slope = -p * s(-0.5 * gap) + (p + marginal) / 2 * s(0.5 * gap)
  assert np.abs(slope - q * slope.sum(1, keepdims=True)).max() < 1e-6
