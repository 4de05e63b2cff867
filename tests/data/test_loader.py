"""The order of batches is decided by the seed and a counter, for any number of processes."""

import itertools
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from research.data.loader import batches
from research.data.packing import PackedDocuments
from research.errors import UserError

BATCH = 8


class Numbers:
  """Row i says i."""

  def __init__(self, n):
    self.n = n

  def __len__(self):
    return self.n

  def __getitem__(self, i):
    return {"row": np.array([i], np.int32), "weights": np.ones(1, np.float32)}


def packed(length=16, drop_last=True):
  rng = np.random.default_rng(0)
  docs = [rng.integers(0, 255, size).astype(np.int32) for size in rng.integers(1, 60, 20)]
  return PackedDocuments(docs, length, 255, drop_last=drop_last)


def take(iterable, n):
  return list(itertools.islice(iterable, n))


def order(n_rows, n_batches, seed=0, **kwargs):
  got = take(batches(Numbers(n_rows), BATCH, seed=seed, train=True, **kwargs), n_batches)
  return np.concatenate([b["row"][:, 0] for b in got])


def assert_same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for name in x:
      np.testing.assert_array_equal(x[name], y[name])


def joined(parts):
  """The global batches of which `parts[index]` are the processes' slices."""
  return [{k: np.concatenate([p[k] for p in ps]) for k in ps[0]} for ps in zip(*parts, strict=True)]


def test_each_epoch_is_another_permutation_of_all_rows():
  n, epochs = 37, 6  # epochs end inside batches
  got = order(n, n * epochs // BATCH + 1)[: n * epochs].reshape(epochs, n)
  for epoch in got:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(n))
  assert len({tuple(epoch) for epoch in got}) == epochs
  assert (got != np.arange(n)).any(axis=1).all()


def test_seeds_give_unrelated_orders():
  a, b = order(50, 50, seed=1).reshape(-1, 50), order(50, 50, seed=2).reshape(-1, 50)
  assert not {tuple(epoch) for epoch in a} & {tuple(epoch) for epoch in b}


def test_another_process_has_the_same_order():
  code = "import test_loader as t; print(t.order(37, 10).tolist())"
  env = os.environ | {"PYTHONHASHSEED": "99"}
  env["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.getcwd()])
  out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
  assert json.loads(out) == order(37, 10).tolist()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_the_slices_of_all_processes_are_the_global_batch(count, train):
  source = packed(drop_last=train)
  whole = take(batches(source, BATCH, seed=3, train=train), 12)
  parts = [take(batches(source, BATCH, seed=3, shard=(i, count), train=train), 12) for i in range(count)]
  assert all(batch["tokens"].shape == (BATCH // count, 16) for part in parts for batch in part)
  assert_same(joined(parts), whole)


def test_resuming_anywhere_goes_on_exactly():
  source = packed()
  whole = take(batches(source, BATCH, seed=0, train=True), 40)
  assert 4 * len(source) < 40 * BATCH
  rng = random.Random(0)
  for cut in [0, 1, 39, *(rng.randrange(40) for _ in range(5))]:
    it = iter(batches(source, BATCH, seed=0, train=True))
    take(it, cut)
    state = json.loads(json.dumps(it.get_state()))
    take(it, rng.randrange(4))  # what follows the save does not matter
    again = iter(batches(source, BATCH, seed=0, train=True))
    take(again, rng.randrange(4))  # nor what the resumed iterator did before
    again.set_state(state)
    assert_same(take(again, 40 - cut), whole[cut:])


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
def test_a_state_resumes_under_another_process_count(before, after):
  source = packed()
  whole = take(batches(source, BATCH, seed=5, train=True), 30)
  states = []
  for i in range(before):
    it = iter(batches(source, BATCH, seed=5, shard=(i, before), train=True))
    take(it, 17)
    states.append(it.get_state())
  assert all(state == states[0] for state in states)
  parts = []
  for i in range(after):
    it = iter(batches(source, BATCH, seed=5, shard=(i, after), train=True))
    it.set_state(states[0])
    parts.append(take(it, 13))
  assert_same(joined(parts), whole[17:])


@pytest.mark.parametrize("n_rows", [1, 3, 8, 9, 16, 21])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_validation_is_every_row_once_in_batches_of_one_shape(n_rows, count):
  parts = [list(batches(Numbers(n_rows), BATCH, seed=0, shard=(i, count), train=False)) for i in range(count)]
  assert {len(part) for part in parts} == {-(-n_rows // BATCH)}
  whole = joined(parts)
  assert all(batch["row"].shape == (BATCH, 1) for batch in whole)
  seen = np.concatenate([b["row"][b["weights"] == 1] for b in whole])
  np.testing.assert_array_equal(seen, np.arange(n_rows))


def test_validation_weighs_every_token_once():
  source = packed(drop_last=False)
  assert len(source) % BATCH != 0
  got = list(batches(source, BATCH, seed=0, train=False))
  assert sum(b["weights"].sum() for b in got) == source.positions
  stream = np.concatenate([b["targets"][b["weights"] == 1] for b in got])
  np.testing.assert_array_equal(stream, source._stream[1:])


def test_validation_starts_over_with_each_iterator():
  dataset = batches(packed(drop_last=False), BATCH, seed=0, train=False)
  assert_same(list(dataset), list(dataset))


def test_fewer_rows_than_a_batch_still_train():
  assert sorted(order(1, 2)) == [0] * 16
  assert sorted(order(3, 3)) == sorted(list(range(3)) * 8)


@pytest.mark.parametrize(
  ("batch", "seed", "count", "told"),
  [
    (6, 0, 4, "batch=6: must divide by the 4 slices"),
    (0, 0, 1, "batch=0: use a positive"),
    (8, -1, 1, "seed=-1: "),
    (8, 2**32, 1, "seed=4294967296: "),
  ],
)
def test_mistakes_are_told_in_a_line(batch, seed, count, told):
  with pytest.raises(UserError) as e:
    batches(packed(), batch, seed=seed, shard=(0, count), train=True)
  assert str(e.value).startswith(told)
  assert "\n" not in str(e.value)
