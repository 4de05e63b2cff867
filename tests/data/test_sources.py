"""Files of many records, compressed ones, and TFDS: what is read, how it is split, what is told."""

import gzip
import hashlib
import json
import time

import pyarrow as pa
from pyarrow import parquet
import pytest

from research.data import text
from research.errors import UserError
from tests.data import every_source

TEXTS = [f"Dokument {i}: grün\n" * (i % 3 + 1) for i in range(100)]


def contents(read):
  return sorted(data.decode() for corpus in read.values() for _, data in corpus.documents)


def pack(path, data):
  """Writes `path`, compressed as its suffix says."""
  if path.suffix == ".gz":
    data = gzip.compress(data)
  elif path.suffix == ".zst":
    data = pa.compress(data[: len(data) // 2], "zstd", asbytes=True) + pa.compress(
      data[len(data) // 2 :], "zstd", asbytes=True
    )
  path.write_bytes(data)


def as_parquet(path, texts, name="text"):
  table = pa.table({"id": list(range(len(texts))), name: texts})
  parquet.write_table(table, path, row_group_size=33)
  return path.read_bytes()


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_every_file_format_is_read_plain_and_compressed(tmp_path, kind, packed):
  if kind == "txt":
    for i, t in enumerate(TEXTS):
      pack(tmp_path / f"{i}.txt{packed}", t.encode())
  elif kind == "jsonl":
    pack(tmp_path / f"all.jsonl{packed}", "".join(json.dumps({"text": t}) + "\n\n" for t in TEXTS).encode())
  else:
    data = as_parquet(tmp_path / "x", TEXTS)
    pack(tmp_path / f"all.parquet{packed}", data)
  assert contents(text.read(f"files:{tmp_path}")) == sorted(TEXTS)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_another_field_is_named_behind_a_question_mark(tmp_path, kind):
  if kind == "jsonl":
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": t, "text": "not this"}) for t in TEXTS))
  else:
    as_parquet(tmp_path / "a.parquet", TEXTS, "body")
  assert contents(text.read(f"files:{tmp_path}?field=body")) == sorted(TEXTS)


def test_records_of_one_file_are_split_by_their_content(tmp_path):
  lines = [json.dumps({"text": t}) for t in TEXTS]
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  before = text.read(f"files:{tmp_path}")
  limit = int(text.VALIDATION_FRACTION * 2**64).to_bytes(8, "big")
  held_out = {t.encode() for t in TEXTS if hashlib.sha256(t.encode()).digest()[:8] < limit}
  assert {data for _, data in before["validation"].documents} == held_out
  assert 0 < len(held_out) < 15
  (tmp_path / "a.jsonl").write_text(
    "\n".join(["", *(json.dumps({"text": f"new {i}"}) for i in range(50)), *lines[::-1]])
  )
  after = text.read(f"files:{tmp_path}")
  for split in text.SPLITS:
    assert {data for _, data in before[split].documents} <= {data for _, data in after[split].documents}


def test_two_records_are_enough_for_two_splits(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
  assert [len(corpus.documents) for corpus in text.read(f"files:{tmp_path}").values()] == [1, 1]


def test_bad_lines_and_rows_are_named(tmp_path):
  good = [json.dumps({"text": t}) for t in TEXTS]
  bad = ["{", "[1]", '{"body": "x"}', '{"text": 3}', '{"text": "\\ud800"}', "[" * 10**5]
  (tmp_path / "a.jsonl").write_text("\n".join([*good[:50], *bad, *good[50:]]))
  as_parquet(tmp_path / "b.parquet", ["row", None, "row too"])
  read = text.read(f"files:{tmp_path}", max_bad_records=7)
  assert read["train"].bad == (*(f"a.jsonl:{i}" for i in range(51, 57)), "b.parquet:2")
  assert contents(read) == sorted([*TEXTS, "row", "row too"])
  with pytest.raises(UserError, match=r"a\.jsonl:53 is bad record number 3 \(no field text, choose .* from body\)"):
    text.read(f"files:{tmp_path}", max_bad_records=2)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.parquet.gz", "a.txt.gz"])
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_broken_file_is_a_bad_record(tmp_path, name, damage):
  for i in range(30):
    (tmp_path / f"good{i}.txt").write_text(f"good {i}")
  if "parquet" in name:
    data = as_parquet(tmp_path / "x", TEXTS)
  else:
    data = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in TEXTS)
  pack(tmp_path / name, data)
  whole = (tmp_path / name).read_bytes()
  (tmp_path / name).write_bytes(whole[:-20] if damage == "cut" else b"plain text\n" * 9)
  read = text.read(f"files:{tmp_path}", max_bad_records=1)
  (bad,) = read["train"].bad
  assert bad.startswith(name)
  with pytest.raises(UserError, match=rf"^max_bad_records=0: {name}.* is bad record number 1") as e:
    text.read(f"files:{tmp_path}", max_bad_records=0)
  assert "\n" not in str(e.value)


def told(source, **kwargs):
  start = time.perf_counter()
  with pytest.raises(UserError) as e:
    text.read(source, **kwargs)
  assert str(e.value).startswith(f"source={source}: ")
  assert "\n" not in str(e.value)
  assert time.perf_counter() - start < 5
  return e.value.fix


def test_a_parquet_without_the_column_is_told(tmp_path):
  as_parquet(tmp_path / "a.parquet", TEXTS, "body")
  assert told(f"files:{tmp_path}") == "a.parquet has no text column text; choose one with ?field= from body"


def test_when_all_is_bad_the_first_is_named(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"body": "a"}\n{"body": "b"}')
  assert "(2 could not be read: a.jsonl:1, ...)" in told(f"files:{tmp_path}", max_bad_records=9)


@pytest.mark.parametrize("item", ["fields=x", "field", "field="])
def test_an_unknown_option_is_told(tmp_path, item):
  (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
  assert told(f"files:{tmp_path}?{item}") == f"?{item} is no option=value; options: field"


def test_tfds_reads_a_prepared_dataset_and_keeps_its_own_held_out_split(tmp_path):
  read = text.read(every_source.tfds(tmp_path))
  assert [len(read[split].documents) for split in text.SPLITS] == [80, 9]
  assert read["train"].documents[0][0].startswith("tiny/train:")
  assert {data.decode() for _, data in read["train"].documents} == set(every_source.texts(80, seed=4))


def test_tfds_without_a_held_out_split_is_split_by_content(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  every_source.tfds(tmp_path, splits=("train",))
  read = text.read("tfds:tiny:1.0.0")
  assert len(read["train"].documents) + len(read["validation"].documents) == 80
  assert 0 < len(read["validation"].documents) < 15


def test_tfds_mistakes_are_told_in_a_line(tmp_path):
  source = every_source.tfds(tmp_path)
  assert told(f"{source}&field=body") == "has no field body; choose one with ?field= from n, text"
  assert told(f"{source}&split=dev") == "has no split dev; choose one with ?split= from train, test"
  assert "is not prepared under" in told(f"tfds:tiny:2.0.0?dir={tmp_path}")
  missing = told(f"tfds:ag_news_subset?dir={tmp_path}")
  assert "is not prepared under" in missing
  assert f"t.data_source('ag_news_subset', data_dir='{tmp_path}')" in missing
  misspelt = told(f"tfds:ag_news_subse?dir={tmp_path}")
  assert misspelt == f"{tmp_path} has no such dataset, nor does tfds list it; did you mean ag_news_subset?"
  assert told("tfds:").startswith("name a dataset")


def test_tfds_prepared_in_another_format_is_told(tmp_path):
  source = every_source.tfds(tmp_path)
  (path,) = tmp_path.rglob("dataset_info.json")
  path.write_text(path.read_text().replace("array_record", "tfrecord"))
  assert told(source) == "is prepared as tfrecord; prepare it with file_format=array_record"


def test_a_damaged_tfds_file_is_named(tmp_path):
  source = every_source.tfds(tmp_path)
  (path,) = tmp_path.rglob("*train.array_record*")
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(UserError) as e:
    text.read(source)
  assert "\n" not in str(e.value)
