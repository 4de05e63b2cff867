"""Documents packed into rows of one length, with random access."""

from collections.abc import Sequence

import numpy as np


class PackedDocuments:
  """A grain random-access source of rows cut from the documents, laid end to end.

  A document t1..tn has n + 1 positions, with inputs eod, t1..tn and targets t1..tn, eod:
  each position's target is in its own document. Row i holds positions
  [i * length, (i + 1) * length). A document cut by the end of a row goes on in the next
  row as a new segment, whose first input is the true previous token.

  A row is a dict of arrays [length]: int32 `tokens`, `targets`, `segment_ids` (from 1,
  and 0 on padding), `positions` (from 0 in each segment), and float32 `weights` (1, and
  0 on padding). Only the last row may need padding; `drop_last` leaves such a row out.
  """

  def __init__(self, documents: Sequence[np.ndarray], length: int, eod: int, *, drop_last: bool):
    sizes = np.array([len(d) + 1 for d in documents], np.int64)
    ends = np.cumsum(sizes)
    self.positions = int(ends[-1]) if len(ends) else 0
    self._length, self._drop_last = length, drop_last
    self._starts = ends - sizes
    # Every document begins with the eod that is also the last target of the one before:
    # targets are the stream one step on, and one eod closes it.
    self._stream = np.full(self.positions + 1, eod, np.uint16 if eod < 2**16 else np.int32)
    for start, document in zip(self._starts, documents, strict=True):
      self._stream[start + 1 : start + 1 + len(document)] = document

  def __len__(self) -> int:
    return self.positions // self._length if self._drop_last else -(-self.positions // self._length)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    if not 0 <= i < len(self):
      raise IndexError(f"row {i} of {len(self)}")
    lo = i * self._length
    hi = min(lo + self._length, self.positions)
    n = hi - lo
    first, last = np.searchsorted(self._starts, (lo + 1, hi))
    begins = self._starts[first:last] - lo  # of the documents that begin inside the row
    segments = np.zeros(n, np.int32)
    segments[begins] = 1
    index = np.arange(n, dtype=np.int32)
    row = {
      "tokens": self._stream[lo:hi].astype(np.int32),
      "targets": self._stream[lo + 1 : hi + 1].astype(np.int32),
      "segment_ids": np.cumsum(segments, dtype=np.int32) + np.int32(1),
      "positions": index - np.maximum.accumulate(segments * index),
      "weights": np.ones(n, np.float32),
    }
    if n < self._length:
      row = {name: np.pad(array, (0, self._length - n)) for name, array in row.items()}
    return row

  def __repr__(self) -> str:
    return f"PackedDocuments({len(self._starts)} documents, {len(self)} rows of {self._length})"
