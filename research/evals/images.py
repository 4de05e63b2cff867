"""How like real images samples are: distances between feature clouds, nearest neighbours, a classifier's opinion.

Everything here takes features, float [n, d], of whichever function the caller has: a
classifier trained in the run, or Inception with weights that the user owns. Only with the
latter, and the published resizing, is the Fréchet distance an FID; with any other it is a
Fréchet classifier distance, and no number of one compares with a number of the other.
All of it is exact float64 on the host.
"""

from collections.abc import Mapping

import numpy as np

from research.errors import check, check_range

_ROWS = 2**22  # distances held at once


def standardiser(features: np.ndarray):
  """features [n, d] -> f: any [m, d] of that kind, so that `features` itself gets mean 0 and deviation 1.

  Features of a classifier have no scale of their own, and a distance between them none either until they do.
  A feature that never varies stays as it is, less its mean.
  """
  mean, deviation = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
  deviation = np.where(deviation > 0, deviation, 1)
  return lambda x: (np.asarray(x, np.float64) - mean) / deviation


def frechet(a: np.ndarray, b: np.ndarray) -> float:
  """The Fréchet distance between Gaussians fitted to a and b [n, d]: |m_a - m_b|² + tr(A + B - 2 (A B)^(1/2)).

  Dowson and Landau (1982); for images Heusel et al. (2017, arXiv 1706.08500). The trace of the
  root is that of the symmetric (A^(1/2) B A^(1/2))^(1/2), whose eigenvalues are real and not
  negative up to rounding: no root of a product that is not symmetric is ever taken. It is
  biased upwards by few samples: compare numbers of equal n only.

  Raises UserError with fewer than two samples, or unequal d.
  """
  return frechet_of_gaussians(*gaussian(a), *gaussian(b))


def gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(mean [d], covariance [d, d]) of features [n, d]. Raises UserError with fewer than two."""
  features = _features(features, "features")
  check(len(features) >= 2, "samples", len(features), "a covariance needs at least 2")
  return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_of_gaussians(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
  """`frechet` of means [d] and covariances [d, d], e.g. of published statistics. Raises UserError for unequal d."""
  check(mean_a.shape == mean_b.shape, "features", f"{len(mean_a)} and {len(mean_b)}", "use one feature function")
  values, vectors = np.linalg.eigh(cov_a)
  root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
  between = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
  return float(np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * between)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
  """The unbiased squared maximum mean discrepancy of a, b [n, d] under (x . y / d + 1)³.

  Bińkowski et al. (2018, arXiv 1801.01401). Its expectation does not depend on n, so it may be
  negative: what `frechet` is not for few samples.
  """
  a, b = _features(a, "a"), _features(b, "b")
  check(min(len(a), len(b)) >= 2, "samples", min(len(a), len(b)), "needs at least 2 of each")
  kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
  within = lambda x: (kernel(x, x).sum() - np.trace(kernel(x, x))) / (len(x) * (len(x) - 1))
  return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def neighbours(real: np.ndarray, samples: np.ndarray, k: int = 5) -> dict[str, float]:
  """Precision and recall (Kynkäänniemi et al., 2019, arXiv 1904.06991), density and coverage (Naeem et al., 2020,
  arXiv 2002.09797), from balls around points that reach to their k-th nearest neighbour in their own set.

  precision: samples in a ball of some real point; recall: real points in a ball of some sample;
  density: balls of real points a sample lies in, over k (may exceed 1); coverage: real points
  with a sample in their ball. Of two halves of one set all expect nearly 1, but for
  precision and recall, which outliers raise and which are below it.
  """
  real, samples = _features(real, "real"), _features(samples, "samples")
  check(1 <= k < min(len(real), len(samples)), "k", k, f"use 1 .. {min(len(real), len(samples)) - 1}")
  radius_real, radius_samples = _kth(real, k), _kth(samples, k)
  in_real = np.zeros(len(samples), np.int64)  # balls of real points each sample lies in
  in_samples, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
  for rows, distances in _distances(real, samples):
    inside = distances <= radius_real[rows, None]
    in_real += inside.sum(0)
    covered[rows] = inside.any(1)
    in_samples[rows] = (distances <= radius_samples[None]).any(1)
  return {
    "precision": float((in_real > 0).mean()),
    "recall": float(in_samples.mean()),
    "density": float(in_real.mean() / k),
    "coverage": float(covered.mean()),
  }


def copies(train: np.ndarray, held_out: np.ndarray, samples: np.ndarray) -> dict[str, float]:
  """Whether samples are the training images again: distances to the nearest of them, pixels or features [n, d].

  sample_to_train and held_out_to_train are medians; as close as held-out images are is as
  close as may be expected. copied: the share of samples nearer than 99 % of held-out images are.
  """
  nearest = lambda x: np.concatenate([d.min(1) for _, d in _distances(_features(x, "images"), train)])
  train = _features(train, "train")
  of_samples, of_held_out = nearest(samples), nearest(held_out)
  return {
    "sample_to_train": float(np.median(of_samples)),
    "held_out_to_train": float(np.median(of_held_out)),
    "copied": float((of_samples < np.quantile(of_held_out, 0.01)).mean()),
  }


def diversity(features: np.ndarray, labels: np.ndarray) -> float:
  """The mean distance between two samples of one class, over classes with at least two."""
  features, found = _features(features, "features"), []
  for label in np.unique(labels):
    of_class = features[labels == label]
    if len(of_class) > 1:
      total = sum(distances.sum() for _, distances in _distances(of_class, of_class))
      found.append(total / (len(of_class) * (len(of_class) - 1)))
  check(bool(found), "labels", "each once", "needs two samples of a class")
  return float(np.mean(found))


def class_score(log_probs: np.ndarray) -> float:
  """exp of the mean KL divergence of p(class | sample) from its mean: Salimans et al. (2016, arXiv 1606.03498).

  log_probs: [n, classes]. From 1, when all samples look alike to the classifier, to the number of classes, when it is
  sure of each and they are spread evenly. With Inception's it is the IS.
  """
  log_probs = _features(log_probs, "log_probs")
  p = np.exp(log_probs)
  log_mean = np.log(np.maximum(p.mean(0), np.finfo(np.float64).tiny))
  return float(np.exp(np.mean(np.sum(np.where(p > 0, p * (log_probs - log_mean), 0), axis=1))))


def fidelity(log_probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """What a classifier (one that training never saw) makes of the classes asked for.

  log_probs: [n, classes]; labels: int [n]. accuracy, and the mean log-probability of the label in nats.
  """
  log_probs = _features(log_probs, "log_probs")
  check_range("labels", labels, log_probs.shape[1])
  return {
    "accuracy": float((log_probs.argmax(1) == labels).mean()),
    "log_prob": float(log_probs[np.arange(len(labels)), labels].mean()),
  }


def compare(
  train: np.ndarray, held_out: np.ndarray, shuffled: np.ndarray, samples: Mapping[str, np.ndarray], *, k: int = 5
) -> dict[str, dict[str, float]]:
  """`frechet`, `kernel_distance` and `neighbours` of each set of samples against held-out images, all as features.

  Features are standardised by `train`, and all sets cut to the size of the smallest, since distances
  depend on it. The rows "floor" (train images in the place of samples) and "ceiling" (`shuffled`:
  held-out images with their pixels in random places) say what a perfect and a worthless model get.
  """
  scale = standardiser(train)
  floor = np.random.default_rng(0).permutation(train)
  sets = {"floor": floor, **samples, "ceiling": shuffled}
  n = min(map(len, (held_out, *sets.values())))
  real = scale(held_out[:n])
  out = {}
  for name, features in sets.items():
    x = scale(features[:n])
    out[name] = {"frechet": frechet(real, x), "kernel_distance": kernel_distance(real, x), **neighbours(real, x, k)}
  return out


def _features(x, name: str) -> np.ndarray:
  x = np.asarray(x, np.float64)
  check(x.ndim == 2, name, x.shape, "use [n, d]")
  bad = np.flatnonzero(~np.isfinite(x).all(1))
  check(bad.size == 0, name, f"row {bad[0] if bad.size else 0}", "is not finite")
  return x


def _distances(x: np.ndarray, y: np.ndarray):
  """(a slice of x's rows, their distances to all of y [rows, len(y)]), block by block."""
  size = max(_ROWS // max(len(y) * y.shape[1], 1), 1)
  for start in range(0, len(x), size):
    rows = slice(start, start + size)
    # differences, not |x|² + |y|² - 2 x y: that would lose the small distances, which are what is asked for
    yield rows, np.sqrt(((x[rows, None] - y[None]) ** 2).sum(-1))


def _kth(x: np.ndarray, k: int) -> np.ndarray:
  """The distance of each row to its k-th nearest other row."""
  return np.concatenate([np.partition(distances, k, axis=1)[:, k] for _, distances in _distances(x, x)])
