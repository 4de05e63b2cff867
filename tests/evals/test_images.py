"""Measures of samples: by hand, in closed form, and at both ends of their ranges."""

import numpy as np
import pytest

from research.errors import UserError
from research.evals import images

RNG = np.random.default_rng(0)


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
  # commuting covariances: |m|² + sum (sqrt(a_i) - sqrt(b_i))²
  a = RNG.normal(size=(200_000, 3)) * [1.0, 2.0, 3.0]
  b = RNG.normal(size=(200_000, 3)) * [1.0, 1.0, 0.5] + [3.0, 0.0, 0.0]
  assert images.frechet(a, b) == pytest.approx(9 + 0 + 1 + 6.25, rel=0.01)


def test_the_frechet_distance_by_hand_in_one_dimension():
  a, b = np.array([[0.0], [2.0]]), np.array([[5.0], [13.0]])  # deviations sqrt(2), sqrt(32)
  assert images.frechet(a, b) == pytest.approx(64 + (np.sqrt(32) - np.sqrt(2)) ** 2, rel=1e-12)


def test_the_frechet_distance_equals_the_root_of_the_product_in_scipy():
  from scipy import linalg

  a, b = RNG.normal(size=(300, 8)) @ RNG.normal(size=(8, 8)), RNG.normal(size=(300, 8)) @ RNG.normal(size=(8, 8))
  cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
  whole = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
  assert images.frechet(a, b) == pytest.approx(whole, rel=1e-9)
  assert images.frechet(a, b) == pytest.approx(images.frechet(b, a), rel=1e-9)


def test_a_covariance_without_full_rank_has_a_finite_distance_and_none_to_itself():
  a = np.repeat(RNG.normal(size=(50, 2)), 8, axis=1)  # rank 2 of 16
  assert abs(images.frechet(a, a)) < 1e-6
  assert np.isfinite(images.frechet(a, a + 1))
  assert images.frechet(a, a + 1) == pytest.approx(16, rel=1e-6)


def test_the_kernel_distance_is_unbiased_and_by_hand():
  a, b = np.array([[1.0], [2.0]]), np.array([[3.0], [0.0]])
  # kernels (xy + 1)^3: within a (2+1)^3 = 27, within b 1, across (4^3 + 1 + 7^3 + 1) / 4
  assert images.kernel_distance(a, b) == pytest.approx(27 + 1 - 2 * (64 + 1 + 343 + 1) / 4)
  halves = [images.kernel_distance(*RNG.normal(size=(2, 40, 4))) for _ in range(400)]
  assert abs(np.mean(halves)) < 4 * np.std(halves) / 20


def test_precision_recall_density_coverage_by_hand():
  real, samples = np.array([[0.0], [1.0], [2.0], [10.0]]), np.array([[0.5], [1.5], [30.0]])
  # k = 1: balls of real points reach 1, 1, 1, 8; those of samples 1, 1, 28.5
  found = images.neighbours(real, samples, k=1)
  assert found["precision"] == pytest.approx(2 / 3)
  assert found["recall"] == 1.0  # 10 lies within 28.5 of 30
  # 0.5 lies in the balls of 0 and 1; 1.5 in those of 1 and 2, not of 10 (8.5 away)
  assert found["density"] == pytest.approx(4 / 3)
  assert found["coverage"] == pytest.approx(3 / 4)


def test_two_halves_of_one_set_cover_each_other_and_another_set_does_not():
  x = RNG.normal(size=(1000, 8))
  same = images.neighbours(x[:500], x[500:], k=5)
  assert same["coverage"] > 0.95
  assert same["density"] == pytest.approx(1, abs=0.1)
  assert set(images.neighbours(x[:500], x[500:] + 100, k=5).values()) == {0.0}


def test_a_collapsed_model_has_precision_without_coverage():
  real = RNG.normal(size=(300, 4))
  samples = real[:1] + 1e-6 * RNG.normal(size=(300, 4))
  found = images.neighbours(real, samples, k=5)
  assert found["precision"] == 1.0
  assert found["coverage"] < 0.1
  assert found["recall"] < 0.1


def test_copies_of_training_images_are_seen():
  train, held_out = RNG.normal(size=(200, 16)), RNG.normal(size=(200, 16))
  assert images.copies(train, held_out, train[:50])["copied"] == 1.0
  assert images.copies(train, held_out, train[:50])["sample_to_train"] == 0.0
  fresh = images.copies(train, held_out, RNG.normal(size=(200, 16)))
  assert fresh["copied"] < 0.05
  assert fresh["sample_to_train"] == pytest.approx(fresh["held_out_to_train"], rel=0.1)


def test_diversity_is_the_mean_distance_within_a_class():
  features, labels = np.array([[0.0], [2.0], [5.0], [9.0], [1e6]]), np.array([0, 0, 1, 1, 2])
  assert images.diversity(features, labels) == pytest.approx((2 + 4) / 2)


def test_the_class_score_goes_from_one_to_the_number_of_classes():
  sure = np.log(np.maximum(np.eye(4), 1e-300))
  assert images.class_score(np.repeat(sure, 3, axis=0)) == pytest.approx(4)
  assert images.class_score(np.log(np.full((5, 4), 0.25))) == pytest.approx(1)
  assert images.class_score(np.where(np.eye(4)[[0, 1]] > 0, 0.0, -800.0)) == pytest.approx(2)


def test_fidelity_is_that_of_the_class_asked_for():
  log_probs = np.log([[0.7, 0.3], [0.6, 0.4]])
  assert images.fidelity(log_probs, np.array([0, 1])) == {
    "accuracy": 0.5,
    "log_prob": pytest.approx((np.log(0.7) + np.log(0.4)) / 2),
  }


def test_a_model_stands_between_the_floor_and_the_ceiling():
  mix = RNG.normal(size=(6, 6))
  real = lambda n: RNG.normal(size=(n, 6)) @ mix
  train, held_out = real(2000), real(800)
  shuffled = RNG.permuted(held_out, axis=0)
  found = images.compare(train, held_out, shuffled, {"good": real(900), "bad": real(900) + 1.0})
  order = [found[name]["frechet"] for name in ("good", "bad")]
  assert found["floor"]["frechet"] < 0.1
  assert order[0] < 0.1 < order[1]
  assert found["ceiling"]["frechet"] > 1.0
  again = images.compare(train * 1000 + 7, held_out * 1000 + 7, shuffled * 1000 + 7, {})
  assert again["ceiling"]["frechet"] == pytest.approx(found["ceiling"]["frechet"], rel=1e-6)  # scale has no part


@pytest.mark.parametrize(
  "call",
  [
    lambda: images.frechet(np.zeros((1, 2)), np.zeros((5, 2))),
    lambda: images.frechet(np.zeros((5, 2)), np.zeros((5, 3))),
    lambda: images.frechet(np.full((5, 2), np.nan), np.zeros((5, 2))),
    lambda: images.neighbours(np.zeros((5, 2)), np.zeros((5, 2)), k=5),
    lambda: images.fidelity(np.zeros((2, 3)), np.array([0, 3])),
    lambda: images.diversity(np.zeros((2, 3)), np.array([0, 1])),
  ],
)
def test_what_cannot_be_measured_is_one_line(call):
  with pytest.raises(UserError) as error:
    call()
  assert "\n" not in str(error.value)
