"""Mixtures keep their proportions in every window, and each source its own epochs."""

import itertools

import numpy as np
import pytest

from research import data
from research.data.mixture import Mixture, interleave, shares
from research.errors import UserError

WEIGHTS = [
  (0.7, 0.3),
  (0.5, 0.3, 0.2),
  (1 / 3, 2 / 3),
  (1.5, 1.01),
  (0.9, 0.05, 0.03, 0.02),
  (0.01, 0.99, 0.1, 0.1, 0.1),
  (0.123456, 0.876544),
]


class Numbers:
  """Row i of source `name` says so."""

  def __init__(self, name, n):
    self.name, self.n, self.positions = name, n, n

  def __len__(self):
    return self.n

  def __getitem__(self, i):
    return {"source": np.array(self.name), "row": np.array(i)}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_window_of_every_length_holds_the_weights(weights):
  n = 5000
  order = np.array([interleave(k, shares(weights))[0] for k in range(n)])
  for part, share in enumerate(np.array(weights) / sum(weights)):
    # the count in rows [a, b) is off by excess[b] - excess[a]
    excess = np.concatenate([[0], np.cumsum(order == part)]) - np.arange(n + 1) * share
    assert excess.max() - excess.min() < len(weights)


def test_it_holds_far_from_the_start_too():
  whole, far = shares((0.7, 0.2, 0.1)), 10**15 + 7
  order = [interleave(far + k, whole)[0] for k in range(1000)]
  assert [order.count(part) for part in range(3)] == pytest.approx([700, 200, 100], abs=3)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_each_part_counts_its_rows_without_a_gap(weights):
  got = [interleave(k, shares(weights)) for k in range(2000)]
  for part in range(len(weights)):
    indices = [i for p, i in got if p == part]
    assert indices == list(range(len(indices)))


def test_shares_are_the_weights_as_written():
  assert shares((0.7, 0.3)) == (7, 3)
  assert shares((70, 30)) == (7, 3)
  assert shares((1e-6, 1)) == (1, 10**6)


def train(seed, n_batches, sizes=(5, 12)):
  mixture = Mixture([Numbers(i, n) for i, n in enumerate(sizes)], (0.25, 0.75))
  got = list(itertools.islice(data.batches(mixture, 4, seed=seed, train=True), n_batches))
  return np.concatenate([b["source"] for b in got]), np.concatenate([b["row"] for b in got])


def test_each_source_is_reshuffled_by_epoch_on_its_own():
  source, row = train(0, 40)
  for part, size in enumerate((5, 12)):
    epochs = row[source == part]
    epochs = epochs[: len(epochs) // size * size].reshape(-1, size)
    assert len(epochs) > 5
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(size), (len(epochs), 1)))
    assert len({tuple(e) for e in epochs}) > len(epochs) // 2


def test_sources_of_one_size_are_not_shuffled_alike():
  source, row = train(0, 100, (50, 50))
  n = (source == 0).sum()
  assert (row[source == 0] != row[source == 1][:n]).any()


def test_the_seed_decides_the_order():
  assert (train(0, 20)[1] == train(0, 20)[1]).all()
  assert (train(0, 20)[1] != train(1, 20)[1]).any()


@pytest.mark.parametrize(
  ("fields", "told"),
  [
    ({"source": ("stdlib", "files:a")}, "weights=(): give each of the 2 sources a weight, as in weights=0.7,0.3"),
    ({"source": ("stdlib", "files:a"), "weights": (1.0,)}, "weights=(1.0,): give one weight for each source: 2"),
    ({"source": ("stdlib", "files:a"), "weights": (1.0, 0.0)}, "weights=(1.0, 0.0): use positive numbers"),
    ({"source": ("stdlib", "stdlib"), "weights": (1.0, 1.0)}, "source=('stdlib', 'stdlib'): name each source once"),
    ({"source": ()}, "source=(): name a source"),
    ({"source": "stdlib"}, "source=stdlib: must be a tuple, as in source = ('stdlib',)"),
  ],
)
def test_a_wrong_mixture_is_told_in_a_line(fields, told):
  with pytest.raises(UserError) as e:
    data.TextConfig(**fields)
  assert str(e.value).startswith(told)
