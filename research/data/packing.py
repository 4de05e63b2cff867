"""Documents packed into rows of one length, with random access."""

from collections.abc import Sequence

import jax
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
  No document may hold `eod`: an input that is `eod` begins a segment. `names` of the
  documents, if given, are what `documents_of` tells.
  """

  def __init__(
    self, documents: Sequence[np.ndarray], length: int, eod: int, *, drop_last: bool, names: Sequence[str] = ()
  ):
    self.positions = sum(len(d) + 1 for d in documents)
    self._names, self._ends = names, np.cumsum([len(d) + 1 for d in documents])
    self._length, self._eod, self._drop_last = length, eod, drop_last
    # Every document begins with the eod that is also the last target of the one before:
    # targets are the stream one step on, and one eod closes it.
    highest = max((int(d.max()) for d in documents if len(d)), default=0)
    self._stream = np.full(self.positions + 1, eod, np.uint16 if max(eod, highest) < 2**16 else np.int32)
    start = 1
    for document in documents:
      self._stream[start : start + len(document)] = document
      start += len(document) + 1

  def __len__(self) -> int:
    return self.positions // self._length if self._drop_last else -(-self.positions // self._length)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    if not 0 <= i < len(self):
      raise IndexError(f"row {i} of {len(self)}")
    lo = i * self._length
    hi = min(lo + self._length, self.positions)
    return packed_row(self._read(lo, hi + 1), self._length, self._eod)

  def documents_of(self, i: int) -> list[str]:
    """The names of the documents in row i, in order, one for each segment; [] if there are no names."""
    first, last = i * self._length, min((i + 1) * self._length, self.positions) - 1
    lo, hi = np.searchsorted(self._ends, [first, last], side="right")
    return list(self._names[lo : hi + 1])

  def _read(self, lo: int, hi: int) -> np.ndarray:
    return self._stream[lo:hi]

  def __repr__(self) -> str:
    return f"{type(self).__name__}({len(self)} rows of {self._length})"


def packed_row(stream: np.ndarray, length: int, eod: int) -> dict[str, np.ndarray]:
  """The row whose n <= `length` inputs and targets are `stream` [n + 1], padded to `length`."""
  stream = stream.astype(np.int32)
  n = len(stream) - 1
  begins = stream[:-1] == eod  # a document
  begins[0] = False  # the first segment begins with the row, whatever it holds
  index = np.arange(n, dtype=np.int32)
  row = {
    "tokens": stream[:-1],
    "targets": stream[1:],
    "segment_ids": np.cumsum(begins, dtype=np.int32) + np.int32(1),
    "positions": index - np.maximum.accumulate(begins * index),
    "weights": np.ones(n, np.float32),
  }
  if n < length:
    row = {name: np.pad(array, (0, length - n)) for name, array in row.items()}
  return row


def abstract_rows(batch: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of `batch` packed rows of `length`."""
  row = packed_row(np.zeros(length + 1, np.int32), length, eod=-1)
  return {name: jax.ShapeDtypeStruct((batch, *x.shape), x.dtype) for name, x in row.items()}
