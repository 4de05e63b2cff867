"""What holds for every kind of source: rows are the text, and their order is exact."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from research import data
from tests.data import every_source

LENGTH, BATCH = 16, 8


@pytest.fixture(scope="module", params=every_source.KINDS)
def loaded(request, tmp_path_factory):
  root = tmp_path_factory.mktemp("source")
  return data.load(every_source.config(request.param, root), LENGTH, seed=0)


def take(iterable, n):
  return list(itertools.islice(iterable, n))


def joined(parts):
  return [{k: np.concatenate([p[k] for p in ps]) for k in ps[0]} for ps in zip(*parts, strict=True)]


def assert_same(a, b):
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for name in x:
      np.testing.assert_array_equal(x[name], y[name])


def test_resuming_at_any_step_is_as_if_uninterrupted(loaded):
  rows = loaded.split("train")
  n = 3 * len(rows) // BATCH  # some epochs
  whole = take(data.batches(rows, BATCH, seed=3, train=True), n)
  for k in (0, 1, n // 2, n - 1):
    it = iter(data.batches(rows, BATCH, seed=3, train=True))
    take(it, k)
    state = json.loads(json.dumps(it.get_state()))
    again = iter(data.batches(rows, BATCH, seed=3, train=True))
    again.set_state(state)
    assert_same(take(again, n - k), whole[k:])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("count", [2, 4])
def test_one_two_and_four_processes_have_the_same_global_batches(loaded, count, train):
  rows = loaded.split("train" if train else "validation")
  whole = take(data.batches(rows, BATCH, seed=5, train=train), 20)
  parts = [take(data.batches(rows, BATCH, seed=5, shard=(i, count), train=train), 20) for i in range(count)]
  assert_same(joined(parts), whole)


def test_a_state_resumes_under_another_process_count(loaded):
  rows = loaded.split("train")
  whole = take(data.batches(rows, BATCH, seed=5, train=True), 12)
  it = iter(data.batches(rows, BATCH, seed=5, shard=(1, 2), train=True))
  take(it, 7)
  parts = []
  for i in range(4):
    again = iter(data.batches(rows, BATCH, seed=5, shard=(i, 4), train=True))
    again.set_state(it.get_state())
    parts.append(take(again, 5))
  assert_same(joined(parts), whole[7:])


def test_validation_rows_decode_to_whole_documents_with_the_bytes_that_info_tells(loaded):
  rows, info = loaded.split("validation"), json.loads(json.dumps(loaded.info()))
  got = [rows[i] for i in range(len(rows))]
  targets = np.concatenate([row["targets"][row["weights"] == 1] for row in got])
  documents = loaded.tokenizer.decode(targets)
  ends = (targets == loaded.tokenizer.eod).sum()
  documents.decode("utf-8")
  assert ends == info["documents"]["validation"] > 0
  assert len(documents) == info["bytes"]["validation"]
  assert len(targets) == info["tokens"]["validation"]
  assert info["bytes_per_token"]["validation"] == pytest.approx(len(documents) / len(targets))
  assert len(got) == info["rows"]["validation"]
  assert set(info["sha256"]) == {"train", "validation"}


def test_the_parts_of_a_mixture_keep_their_own_bits(tmp_path):
  loaded = data.load(every_source.config("mixture", tmp_path), LENGTH, seed=0)
  info, rows = loaded.info(), loaded.split("validation")
  assert [part["source"] for part in info["sources"]] == info["source"]
  assert info["weights"] == [0.5, 0.2, 0.3]
  for name in ("documents", "bytes", "tokens", "rows"):
    assert info[name]["validation"] == sum(part[name]["validation"] for part in info["sources"])
  own = [part["validation"][i] for part in loaded.parts for i in range(len(part["validation"]))]
  assert_same([rows[i] for i in range(len(rows))], own)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_shards_hold_what_is_tokenized_in_memory(tmp_path, monkeypatch, tokenizer):
  monkeypatch.setenv("REPRISE_CACHE", str(tmp_path / "cache"))
  options = {"tokenizer": tokenizer, "bpe_vocab": 300}
  from_disk = data.load(every_source.config("shards", tmp_path / "a", **options), LENGTH, seed=0)
  in_memory = data.load(every_source.config("jsonl.gz", tmp_path / "b", **options), LENGTH, seed=0)
  assert from_disk.tokenizer.sha256 == in_memory.tokenizer.sha256

  for split in ("train", "validation"):
    streams = [loaded.split(split)._read(0, loaded.split(split).positions + 1) for loaded in (from_disk, in_memory)]
    eod = in_memory.tokenizer.eod
    a, b = (sorted(part.tolist() for part in np.split(s, np.flatnonzero(s == eod) + 1)) for s in streams)
    assert a == b
    assert len(a) > 1


def test_the_tokenizer_of_a_config_is_the_one_of_its_data(tmp_path, monkeypatch):
  monkeypatch.setenv("REPRISE_CACHE", str(tmp_path / "cache"))
  for kind in ("txt", "shards", "mixture"):
    cfg = every_source.config(kind, tmp_path / kind, tokenizer="bpe", bpe_vocab=300)
    assert data.load_tokenizer(cfg).sha256 == data.load(cfg, LENGTH, 0).tokenizer.sha256
  assert data.load_tokenizer(data.TextConfig(source=("files:/nowhere",))).vocab == 256  # reads nothing


def test_tensorflow_is_never_imported(tmp_path):
  source = every_source.tfds(tmp_path)
  code = f"""
import sys
from research import data
rows = data.load(data.TextConfig(source=({source!r},)), 16, 0).split("train")
next(iter(data.batches(rows, 8, seed=0, train=True)))
assert "tensorflow_datasets" in sys.modules
print([m for m in ("tensorflow", "torch") if m in sys.modules])
"""
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
  assert out.strip().splitlines()[-1] == "[]"
