"""Decoding by powers of the decay overflows where float32 does; decoding by a decayed state stays exact."""

import math

import jax
import numpy as np
import pytest

from experiments.transnormer import stability
from experiments.transnormer.reports.stability import LENGTH, measure
from research.kernels.lightning_attention import reference


@pytest.mark.parametrize(("decay", "token"), [(0.9, 842), (math.exp(-7), 12), (math.exp(-1), 88)])
def test_the_factor_overflows_at_the_token_that_arithmetic_says(decay, token):
  assert stability.overflows_at(decay) == token
  with np.errstate(over="ignore"):
    power = np.float32(decay) ** -np.float32([token, token + 1])  # token t has decay^-(t+1)
  np.testing.assert_array_equal(np.isfinite(power), [True, False])


def test_both_forms_are_the_dense_one_while_nothing_overflows():
  rng = np.random.default_rng(0)
  q, k, v = rng.standard_normal((3, 40, 3, 4))
  decay = np.exp(-np.array([0.0, 0.1, 7.0]))  # 40 times 7 is within float64
  with jax.enable_x64(True):
    truth = reference.attention(q[None], k[None], v[None], decay)[0][0]
    np.testing.assert_allclose(stability.naive(q, k, v, decay), truth, atol=1e-10)
    np.testing.assert_allclose(reference.recurrent(q[None], k[None], v[None], decay)[0][0], truth, atol=1e-12)


def test_the_naive_form_is_lost_at_that_token_and_the_robust_one_exact_to_the_end():
  decays = np.array([0.9, math.exp(-7)])
  naive, robust = measure(decays, seed=0)
  assert robust.shape == (2, LENGTH)
  assert robust.max() < 1e-5
  for error, decay in zip(naive, decays, strict=True):
    token = stability.overflows_at(decay)
    assert not np.isfinite(error[token:]).any()
    assert (error[: token // 2] < 1e-5).all()  # and exact before
