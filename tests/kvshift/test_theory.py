"""The theory in float64: theorem 2 to the last digit, theorem 3 against a whole attention, and the misprint."""

import jax
import numpy as np
import pytest

from experiments.kvshift import theory
from experiments.kvshift.tasks.induction import InductionConfig, InductionRows
from tests import small

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("slope", [0.0, 0.3])
@pytest.mark.parametrize(("length", "d"), [(4, 3), (12, 8), (40, 5)])
def test_one_layer_with_shifted_keys_is_the_induction_head(length, d, slope):
  x = RNG.normal(size=(length, d))
  with jax.enable_x64(True):
    np.testing.assert_allclose(theory.one_layer(x, 0.7, slope), theory.induction_head(x, 0.7, slope), atol=1e-12)
    # the two ends that the definition leaves out, and a layer cannot
    assert np.abs(theory.one_layer(x, 0.7, slope, ends=True) - theory.induction_head(x, 0.7, slope)).max() > 1e-9


def test_the_definition_is_the_sum_written_out():
  x = RNG.normal(size=(6, 4))
  weights = {s: np.exp(x[5] @ x[s - 2] / 0.5 - 0.2 * (6 - s)) for s in range(2, 6)}  # s from 1, as in the paper
  expected = sum(w * x[s - 1] for s, w in weights.items()) / sum(weights.values())
  np.testing.assert_allclose(theory.induction_head(x, 0.5, 0.2), expected, rtol=1e-12)


def test_the_hand_built_head_solves_induction_and_without_the_shift_it_does_not(monkeypatch):
  rows = [InductionRows(InductionConfig(), 64, 64, 0, "validation")[i] for i in range(64)]
  with small.use():
    assert theory.hand_built_accuracy(rows, np.eye(64), 0.05) == 1
    monkeypatch.setattr(theory, "KEY", theory.VALUE)  # keys of the current token: it finds itself
    assert theory.hand_built_accuracy(rows, np.eye(64), 0.05) < 0.1


def flow_loss_by_attention(a: np.ndarray, b: np.ndarray, others: int, i: int = 2) -> float:
  """`theory.flow_loss` at one (a1, a2) and (b1, b2), from a whole attention over the embeddings; i counts from 1."""
  length = others + 4
  tokens = np.append(np.arange(length), i - 1)
  x = np.eye(length)[tokens]
  before = np.vstack([np.zeros(length), x[:-1]])
  k, v = a[0] * x + a[1] * before, b[0] * x + b[1] * before
  weights = np.exp(k @ x[-1])
  logits = weights @ v / weights.sum()
  return float(np.log(np.exp(logits).sum()) - logits[i])


@pytest.mark.parametrize("others", [0, 10, 100])
def test_the_closed_form_is_what_attention_gives_and_the_printed_one_is_not(others):
  for _ in range(20):
    a, b = RNG.uniform(-1, 2, size=(2, 2))
    truth = flow_loss_by_attention(a, b, others)
    assert theory.flow_loss(a, b, others) == pytest.approx(truth, abs=1e-12)
    assert abs(theory.flow_loss(a, b, others, misprinted=True) - truth) > 1e-9


def test_where_the_repeated_token_stood_does_not_matter():
  for i in (2, 5, 8):
    assert flow_loss_by_attention((0.2, 0.8), (1.1, -0.3), 6, i) == pytest.approx(
      theory.flow_loss((0.2, 0.8), (1.1, -0.3), 6), abs=1e-12
    )
