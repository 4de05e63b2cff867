"""Batches in an order that only the seed and a counter decide, cut among processes."""

from collections.abc import Callable
import copy
import functools
import sys

import grain
import numpy as np

from research.data.mixture import Mixture, interleave
from research.errors import check

Row = dict[str, np.ndarray]
Prepare = Callable[[Row, np.random.Generator | None], Row]


def batches(
  source, batch: int, *, seed: int, shard: tuple[int, int] = (0, 1), train: bool, prepare: Prepare | None = None
) -> grain.IterDataset:
  """Process `index` of `count`'s part, [batch / count, ...] arrays, of each global batch of `source`.

  Global batch k is rows [k * batch, (k + 1) * batch) of one global order, and process
  `index` holds the index-th of `count` contiguous slices of it. In training the order is
  endless: all rows, shuffled anew in every epoch. In validation it is one pass in the
  source's order, and the last batch is filled up with rows of zeros (zero `weights`).

  The iterator's state is the number of batches taken: it resumes under any `count`.

  Args:
    source: random access to rows, dicts of arrays whose shapes do not vary.
    batch: rows in the global batch.
    seed: in [0, 2**32).
    shard: (index, count), as from `research.mesh.batch_shard`.
    prepare: (row, rng or None) -> row, of each row as it is taken: with a generator of its own for each
      row of each epoch in training, with None in validation.

  Raises:
    UserError: `batch` does not divide by `count`, or `seed` is out of range.
  """
  index, count = shard
  check(batch >= 1, "batch", batch, "use a positive number of rows")
  check(batch % count == 0, "batch", batch, f"must divide by the {count} slices in which processes load it")
  check(0 <= seed < 2**32, "seed", seed, "use a number from 0 to 4294967295")
  rows = _endless(source, seed) if train else grain.MapDataset.source(source)
  if prepare is not None:
    rows = rows.seed(seed).random_map(prepare) if train else rows.map(functools.partial(prepare, rng=None))
  # Rows come from memory, or files kept there: one thread keeps the work off the training
  # loop, more only contend for the GIL.
  return _Batches(rows, batch, index, count).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def same_batch(rows: Row, *, shard: tuple[int, int], train: bool) -> grain.IterDataset:
  """Process `index` of `count`'s part of the one global batch `rows`: in training over and over, in validation once.

  For what has no data to sample, such as games that are known whole.
  """
  index, count = shard
  size = len(next(iter(rows.values()))) // count
  part = grain.MapDataset.source([{name: x[index * size : (index + 1) * size] for name, x in rows.items()}])
  return (part.repeat() if train else part).to_iter_dataset(grain.ReadOptions(num_threads=1))


def training_rows(source, batch: int, k: int, *, seed: int) -> list[tuple[int, int]]:
  """(part, row) of every row of the k-th global batch that `batches` takes from `source` in training."""
  parts = source.parts if isinstance(source, Mixture) else (source,)
  numbered = [[(part, i) for i in range(len(rows))] for part, rows in enumerate(parts)]
  if isinstance(source, Mixture):
    source = copy.copy(source)
    source.parts = tuple(numbered)
  else:
    source = numbered[0]
  rows = _endless(source, seed)
  return [rows[i] for i in range(k * batch, (k + 1) * batch)]


def _endless(source, seed: int) -> grain.MapDataset:
  if isinstance(source, Mixture):
    seeds = np.random.SeedSequence(seed).generate_state(len(source.parts))
    parts = [_endless(part, int(s)) for part, s in zip(source.parts, seeds, strict=True)]
    return _Interleaved(parts, source.shares)
  return grain.MapDataset.source(source).seed(seed).shuffle().repeat()


class _Interleaved(grain.MapDataset):
  """Rows of endless parts, in proportion to `shares`."""

  def __init__(self, parts: list[grain.MapDataset], shares: tuple[int, ...]):
    super().__init__(parts)
    self._shares = shares

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, k):
    if isinstance(k, slice):
      return self.slice(k)
    part, i = interleave(k, self._shares)
    return self._parents[part][i]

  def __str__(self) -> str:
    return f"Interleaved({len(self._parents)} parts in proportions {self._shares})"


class _Batches(grain.MapDataset):
  """Item k is one process's slice of global batch k."""

  def __init__(self, rows: grain.MapDataset, batch: int, index: int, count: int):
    super().__init__(rows)
    self._batch, self._size = batch, batch // count
    self._offset = index * self._size

  def __len__(self) -> int:
    return -(-len(self._parent) // self._batch)

  def __getitem__(self, k):
    if isinstance(k, slice):
      return self.slice(k)
    lo = k * self._batch + self._offset
    rows = [self._parent[i] for i in range(lo, min(lo + self._size, len(self._parent)))]
    if len(rows) < self._size:
      blank = {name: np.zeros_like(array) for name, array in self._parent[0].items()}
      rows += [blank] * (self._size - len(rows))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

  def __str__(self) -> str:
    return f"Batches({self._size} of {self._batch} rows from {self._offset})"
