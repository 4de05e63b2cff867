"""Packed rows hold every document exactly, and never mix two in a segment."""

import numpy as np
import pytest

from research.data.packing import PackedDocuments

EOD = 99
LENGTHS = [2, 3, 7, 16, 1000]


def documents(seed=0, n=30):
  """Short ones, long ones, single tokens and one that is many rows long."""
  rng = np.random.default_rng(seed)
  sizes = [*rng.integers(1, 20, n - 3), 1, 150, 15]
  return [rng.integers(0, EOD, size).astype(np.int32) for size in sizes]


def rows(source):
  return [source[i] for i in range(len(source))]


def stack(source):
  return {name: np.stack([row[name] for row in rows(source)]) for name in source[0]}


@pytest.mark.parametrize("length", LENGTHS)
def test_every_document_comes_back_from_the_rows(length):
  docs = documents()
  got = stack(PackedDocuments(docs, length, EOD, drop_last=False))
  used = got["weights"] == 1
  ends = np.flatnonzero(got["targets"][used] == EOD)
  tokens, targets = got["tokens"][used], got["targets"][used]
  begin = 0
  for document, end in zip(docs, ends, strict=True):
    np.testing.assert_array_equal(tokens[begin : end + 1], [EOD, *document])
    np.testing.assert_array_equal(targets[begin : end + 1], [*document, EOD])
    begin = end + 1
  assert begin == used.sum() == sum(len(d) + 1 for d in docs)


def reference(docs, length):
  """The same rows, one position after the other."""
  stream = [(x, y, j == 0) for d in docs for j, (x, y) in enumerate(zip([EOD, *d], [*d, EOD], strict=True))]
  for lo in range(0, len(stream), length):
    row = {name: [] for name in ("tokens", "targets", "segment_ids", "positions", "weights")}
    segment, position = 1, 0
    for i, (x, y, begins) in enumerate(stream[lo : lo + length]):
      if begins and i > 0:
        segment, position = segment + 1, 0
      for name, value in zip(row, (x, y, segment, position, 1), strict=True):
        row[name].append(value)
      position += 1
    yield {name: values + [0] * (length - len(values)) for name, values in row.items()}


@pytest.mark.parametrize("length", LENGTHS)
def test_rows_agree_with_a_walk_over_the_positions(length):
  docs = documents(1)
  source = PackedDocuments(docs, length, EOD, drop_last=False)
  expected = list(reference(docs, length))
  assert len(source) == len(expected)
  for row, wanted in zip(rows(source), expected, strict=True):
    for name, values in wanted.items():
      np.testing.assert_array_equal(row[name], values, err_msg=name)
      assert row[name].dtype == (np.float32 if name == "weights" else np.int32)
      assert row[name].shape == (length,)


def test_a_segment_holds_one_document():
  docs = [np.full(size, i, np.int32) for i, size in enumerate([3, 9, 1, 30, 2, 8])]
  got = stack(PackedDocuments(docs, 8, EOD, drop_last=False))
  for tokens, segments in zip(got["tokens"], got["segment_ids"], strict=True):
    for segment in set(segments) - {0}:
      inside = tokens[segments == segment]
      assert len(set(inside) - {EOD}) <= 1
      assert EOD not in inside[1:]


def test_targets_are_the_next_tokens_of_a_segment():
  got = stack(PackedDocuments(documents(), 16, EOD, drop_last=False))
  same = (got["segment_ids"][:, 1:] == got["segment_ids"][:, :-1]) & (got["weights"][:, 1:] == 1)
  np.testing.assert_array_equal(got["targets"][:, :-1][same], got["tokens"][:, 1:][same])
  last = ~same & (got["weights"][:, 1:] == 1)
  assert (got["targets"][:, :-1][last] == EOD).all()


def test_a_cut_document_goes_on_with_its_true_previous_token():
  source = PackedDocuments([np.arange(10, dtype=np.int32)], 4, EOD, drop_last=False)
  assert source[0]["tokens"].tolist() == [EOD, 0, 1, 2]
  assert source[1]["tokens"].tolist() == [3, 4, 5, 6]
  assert source[0]["targets"].tolist() == [0, 1, 2, 3]
  assert source[1]["positions"].tolist() == [0, 1, 2, 3]
  assert source[1]["segment_ids"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("length", LENGTHS)
def test_only_a_last_row_in_need_of_padding_is_dropped(length):
  for n in range(1, 20):
    docs = [np.zeros(n, np.int32)] * 3
    total = 3 * (n + 1)
    dropped = PackedDocuments(docs, length, EOD, drop_last=True)
    kept = PackedDocuments(docs, length, EOD, drop_last=False)
    assert (len(dropped), len(kept)) == (total // length, -(-total // length))
    assert all((row["weights"] == 1).all() for row in rows(dropped))
    assert sum(row["weights"].sum() for row in rows(kept)) == kept.positions == total


def test_padding_is_zero_everywhere():
  row = PackedDocuments([np.array([5, 6], np.int32)], 8, EOD, drop_last=False)[0]
  assert all((array[3:] == 0).all() for array in row.values())


def test_large_vocabularies_fit():
  eod = 2**18
  row = PackedDocuments([np.array([eod - 1], np.int32)], 2, eod, drop_last=True)[0]
  assert row["tokens"].tolist() == [eod, eod - 1]


def test_it_is_a_sequence_of_rows():
  source = PackedDocuments(documents(), 16, EOD, drop_last=True)
  for i in (-1, len(source)):
    with pytest.raises(IndexError):
      source[i]
  assert repr(source) == f"PackedDocuments({len(source)} rows of 16)"


def test_rows_own_their_memory():
  source = PackedDocuments(documents(), 16, EOD, drop_last=True)
  before = source[0]["tokens"].copy()
  source[0]["tokens"][:] = 0
  np.testing.assert_array_equal(source[0]["tokens"], before)
