"""Rows from shards are those of memory, read lazily, and damage is told with the shard's name."""

import copy
import json
import random

import numpy as np
import pytest

from research import data
from research.data import shards, tokenizer
from research.data.packing import PackedDocuments
from research.errors import UserError
from tests.data import every_source

SIZE = 2 * shards.PIECE


def documents():
  """Short ones, an ordinary one, and one that is many shards long."""
  rng = random.Random(0)
  sizes = [*(rng.randrange(1, 50) for _ in range(200)), 3000, 100_000, 7, SIZE - 1, SIZE, 1]
  return [bytes(rng.randrange(32, 127) for _ in range(size)) for size in sizes]


def write(root, texts, stop=None, entry=None):
  """Writes a split; `stop`: leaves off after so many documents, as a kill would, returning the entry so far."""
  bytes_ = tokenizer.byte_level()
  saved = [copy.deepcopy(entry or {"shards": []})]
  writer = shards.ShardWriter(root, "train", bytes_, SIZE, copy.deepcopy(saved[0]), lambda: None)
  writer._on_shard = lambda: saved.append(copy.deepcopy(writer.entry))
  for i, text in enumerate(texts):
    if i == stop:
      return saved[-1]
    if not writer.skips(text):
      writer.add(text, bytes_.encode(text))
  writer.finish()
  return writer.entry


def complete(root, entry):
  bytes_ = tokenizer.byte_level()
  about = {"name": "bytes", "vocab": 256, "eod": 255, "sha256": bytes_.sha256}
  settings = {"source": "test", "shard_tokens": SIZE}
  manifest = {"format": shards.FORMAT, "complete": True, "settings": settings, "tokenizer": about, "bad_records": []}
  (root / "manifest.json").write_text(json.dumps(manifest | {"splits": {"train": entry, "validation": entry}}))
  return f"shards:{root}"


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("length", [16, 1000, 1024, 10_000])
def test_rows_are_those_of_packed_documents(tmp_path, length, drop_last):
  texts = documents()
  source = complete(tmp_path, write(tmp_path, texts))
  ids = [tokenizer.byte_level().encode(text) for text in texts]
  expected = PackedDocuments(ids, length, 255, drop_last=drop_last)
  rows = shards.PackedShards(source, "train", length, drop_last=drop_last)
  assert (len(rows), rows.positions) == (len(expected), expected.positions)
  order = list(range(len(rows)))
  random.Random(0).shuffle(order)
  for i in order[:2000]:
    row, want = rows[i], expected[i]
    assert row.keys() == want.keys()
    for name in row:
      assert row[name].dtype == want[name].dtype
      np.testing.assert_array_equal(row[name], want[name])
  assert len(list(tmp_path.glob("*.array_record"))) > 10


@pytest.mark.parametrize("n", [SIZE - 2, SIZE - 1, SIZE, shards.PIECE - 2, 1])
def test_a_stream_that_ends_where_a_shard_ends_is_whole(tmp_path, n):
  entry = write(tmp_path, [b"x" * n])
  assert entry["tokens"] == n + 1
  rows = shards.PackedShards(complete(tmp_path, entry), "train", 2, drop_last=False)
  got = np.concatenate([rows[i]["targets"][rows[i]["weights"] == 1] for i in range(len(rows))])
  assert got.tolist() == [*b"x" * n, 255]


def test_writing_goes_on_wherever_it_was_left(tmp_path):
  texts = documents()
  (tmp_path / "whole").mkdir()
  whole = write(tmp_path / "whole", texts)
  for stop in [0, 1, 150, *range(200, len(texts))]:
    root = tmp_path / str(stop)
    root.mkdir()
    assert write(root, texts, entry=write(root, texts, stop)) == whole
    files = {path.name: path.read_bytes() for path in root.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


def test_going_on_with_other_text_is_refused(tmp_path):
  texts = documents()
  entry = write(tmp_path, texts, 203)
  assert entry["cursor"]["documents"] > 100
  for other in ([b"new", *texts[1:]], [*texts[:201], b"y" * 100_000, *texts[202:]], texts[:50]):
    with pytest.raises(UserError, match="^out=.*the source is not what its train shards were written from"):
      write(tmp_path, other, entry=entry)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  root = tmp_path_factory.mktemp("shards")
  return every_source.config("shards", root, tokenizer="bpe", bpe_vocab=300), root / "shards"


@pytest.fixture
def folder(written, tmp_path):
  """(config, directory) of a copy to damage."""
  cfg, root = written
  for path in root.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  return data.TextConfig(source=(f"shards:{tmp_path}",), tokenizer="bpe", bpe_vocab=300), tmp_path


def told(cfg):
  with pytest.raises(UserError) as e:
    data.load(cfg, 16, 0)
  assert "\n" not in str(e.value)
  return str(e.value)


def test_missing_and_short_shards_are_named(folder):
  cfg, root = folder
  path = root / "train-00000.array_record"
  content = path.read_bytes()
  path.write_bytes(content[:-1])
  assert told(cfg).startswith(f"source=shards:{root}: train-00000.array_record is damaged: restore it")
  path.unlink()
  assert told(cfg) == f"source=shards:{root}: train-00000.array_record is missing"


def test_a_flipped_bit_changes_no_token_unnoticed(folder):
  cfg, root = folder
  path = root / "train-00000.array_record"
  content = path.read_bytes()
  rows = data.load(cfg, 16, 0).split("train")
  want = np.stack([rows[i]["targets"] for i in range(len(rows))])
  noticed, rng = 0, random.Random(0)
  used = [i for i, byte in enumerate(content) if byte]  # the rest is padding
  for _ in range(60):
    flipped = bytearray(content)
    flipped[rng.choice(used)] ^= 1 << rng.randrange(8)
    path.write_bytes(flipped)
    rows = data.load(cfg, 16, 0).split("train")
    try:
      got = np.stack([rows[i]["targets"] for i in range(len(rows))])
    except UserError as e:
      noticed += str(e).startswith(f"source=shards:{root}: train-00000.array_record is damaged")
      continue
    np.testing.assert_array_equal(got, want)
  assert noticed > 40


def test_damage_met_in_training_is_told_through_the_loader(folder):
  cfg, root = folder
  path = root / "train-00000.array_record"
  loaded = data.load(cfg, 16, 0)
  path.write_bytes(b"\0" * path.stat().st_size)
  with pytest.raises(UserError, match=r"train-00000\.array_record is damaged"):
    next(iter(data.batches(loaded.split("train"), 8, seed=0, train=True)))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"tokenizer": "bytes"}, "tokenizer=bytes: shards:{} was written with bpe of 300 ids, sha256 "),
    ({"bpe_vocab": 400}, "bpe_vocab=400: shards:{} was written with bpe of 300 ids"),
  ],
)
def test_another_tokenizer_than_the_shards_is_told(folder, fields, message):
  cfg, root = folder
  fields = {"tokenizer": "bpe", "bpe_vocab": 300} | fields
  assert told(data.TextConfig(source=cfg.source, **fields)).startswith(message.format(root))


def test_a_damaged_tokenizer_or_manifest_is_told(folder):
  cfg, root = folder
  manifest = json.loads((root / "manifest.json").read_text())
  model = (root / "tokenizer.json").read_text()
  for damaged in ("", "{}", model[:-50], model.replace('"the"', '"teh"', 1) + " "):
    (root / "tokenizer.json").write_text(damaged)
    assert told(cfg).startswith(f"source=shards:{root}: tokenizer.json is damaged")
  for damaged in ("", "[]", "{}", json.dumps(manifest)[:-9], json.dumps(manifest | {"splits": 3})):
    (root / "manifest.json").write_text(damaged)
    assert told(cfg).startswith(f"source=shards:{root}: its manifest.json is damaged")
  (root / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
  assert told(cfg).startswith(f"source=shards:{root}: is not finished")
  (root / "manifest.json").unlink()
  assert told(cfg).startswith(f"source=shards:{root}: has no manifest.json")


def test_no_directory_is_told():
  assert told(data.TextConfig(source=("shards:/nowhere",))) == "source=shards:/nowhere: there is no such directory"
  assert told(data.TextConfig(source=("shards:",))).startswith("source=shards:: name a directory")
