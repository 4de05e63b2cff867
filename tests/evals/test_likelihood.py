"""Likelihoods are sums of the full forward's log-probabilities, however rows are padded, batched and cut."""

import math

import jax
import numpy as np
import pytest

from research import data
from research.data import PackedDocuments
from research.errors import UserError
from research.evals.likelihood import log_likelihoods, perplexity
from research.mesh import MeshConfig
from research.models.transformer import Transformer
from tests import small

RNG = np.random.default_rng(0)
ROWS = [(RNG.integers(64, size=n).tolist(), start) for n, start in ((9, 4), (2, 1), (70, 69), (30, 1), (130, 100))]


def by_hand(model, ids, start):
  row = np.array([ids], np.int32)
  logits = model.logits(row, np.ones_like(row), np.arange(len(ids), dtype=np.int32)[None])
  log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)[0]
  return sum(log_p[t - 1, ids[t]] for t in range(start, len(ids)))


def test_they_are_the_sums_of_what_the_model_says_of_each_row_alone():
  with small.use():
    model = Transformer(jax.random.key(0), small.MODEL)
    got = log_likelihoods(model, ROWS, max_length=200, batch=2)
    np.testing.assert_allclose(got, [by_hand(model, *row) for row in ROWS], rtol=1e-5)


def test_rows_that_are_too_long_lose_their_front():
  with small.use():
    model = Transformer(jax.random.key(0), small.MODEL)
    got = log_likelihoods(model, ROWS[-1:], max_length=64)
    assert got[0] == pytest.approx(by_hand(model, ROWS[-1][0][-64:], 34), rel=1e-5)


@pytest.mark.parametrize("mesh", [MeshConfig(1, 2, 2, "fsdp_tp"), MeshConfig(1, 4, 1, "fsdp")], ids=str)
def test_four_devices_find_what_one_finds(mesh):
  with small.use():
    expected = log_likelihoods(Transformer(jax.random.key(0), small.MODEL), ROWS, max_length=200)
  with small.use(mesh, devices=4):
    model = Transformer(jax.random.key(0), small.MODEL, mesh.partition)
    np.testing.assert_allclose(log_likelihoods(model, ROWS, max_length=200), expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("row", "told"),
  [(([1, 2], 0), "before it"), (([1, 2], 2), "of its own"), (([1] * 40, 3), "does not fit"), (([1, 64], 1), "0 .. 63")],
)
def test_rows_that_mean_nothing_are_refused(row, told):
  with small.use(), pytest.raises(UserError, match=told):
    log_likelihoods(Transformer(jax.random.key(0), small.MODEL), [row], max_length=30)


def test_perplexity_counts_every_byte_once_and_bits_are_of_bytes():
  documents = [RNG.integers(60, size=n).astype(np.int32) for n in (50, 3, 17)]
  with small.use():
    model = Transformer(jax.random.key(0), small.MODEL)
    rows = PackedDocuments(documents, 100, eod=63, drop_last=False)
    got = perplexity(model, data.batches(rows, 1, seed=0, train=False), bytes_of_text=35)
    nats = -sum(by_hand(model, [63, *ids, 63], 1) for ids in documents)
  assert got["tokens"] == 73
  assert got["nats_per_token"] == pytest.approx(nats / 73, rel=1e-5)
  assert got["perplexity"] == pytest.approx(math.exp(nats / 73), rel=1e-4)
  assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / 35, rel=1e-5)
