"""`load`: from a TextConfig to packed splits and a manifest entry."""

import dataclasses
import json
import subprocess
import sys
import typing

import numpy as np
import pytest

from research import data
from research.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("texts")
  for i in range(60):
    (root / f"{i}.md").write_text(f"# Größe {i}\n" + f"line {i} of text\n" * (i % 7 + 1))
  return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("REPRISE_CACHE", str(tmp_path))


def config(folder, **kwargs):
  return data.TextConfig(source=(f"files:{folder}",), **kwargs)


def decoded(loaded, split):
  """The documents of a split, from its rows."""
  source = loaded.split(split)
  rows = [source[i] for i in range(len(source))]
  targets = np.concatenate([row["targets"][row["weights"] == 1] for row in rows])
  ends = np.flatnonzero(targets == loaded.tokenizer.eod)
  return [loaded.tokenizer.decode(part) for part in np.split(targets, ends + 1) if len(part)]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_rows_decode_to_the_files(folder, tokenizer):
  loaded = data.load(config(folder, tokenizer=tokenizer, bpe_vocab=300), length=7, seed=0)
  files = {path.read_bytes() for path in folder.iterdir()}
  validation, train = decoded(loaded, "validation"), decoded(loaded, "train")
  whole = train[:-1]  # the row that is dropped may hold the end of the last document
  assert set(whole) | set(validation) <= files
  assert len(whole) + len(validation) >= len(files) - 2
  assert not set(whole) & set(validation)


def test_the_stdlib_is_the_default():
  loaded = data.load(data.TextConfig(), length=1024, seed=0)
  info = loaded.info()
  assert info["source"] == "stdlib"
  assert len(loaded.split("train")) > 9000
  assert info["bad_records"] == []


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_info_counts_what_the_rows_hold(folder, tokenizer):
  loaded = data.load(config(folder, tokenizer=tokenizer, bpe_vocab=300), length=16, seed=0)
  info = json.loads(json.dumps(loaded.info()))
  source = loaded.split("validation")
  weights = sum(source[i]["weights"].sum() for i in range(len(source)))
  documents = decoded(loaded, "validation")
  assert info["tokens"]["validation"] == weights
  assert info["documents"]["validation"] == len(documents)
  assert info["bytes"]["validation"] == sum(map(len, documents))
  assert info["bytes_per_token"]["validation"] == pytest.approx(sum(map(len, documents)) / weights)
  assert info["rows"] == {split: len(loaded.split(split)) for split in ("train", "validation")}
  assert info["tokenizer"]["name"] == tokenizer
  assert info["tokenizer"]["sha256"] == loaded.tokenizer.sha256
  assert info["known"] is False


def test_the_seed_orders_train_and_leaves_validation(folder):
  a, b = (data.load(config(folder), length=16, seed=seed) for seed in (0, 1))
  assert decoded(a, "validation") == decoded(b, "validation")
  assert decoded(a, "train") != decoded(b, "train")
  assert decoded(a, "train") == decoded(data.load(config(folder), length=16, seed=0), "train")


def test_too_little_text_is_told(folder):
  with pytest.raises(UserError, match=r"^source=files:.*: has \d+ train tokens, too few for one row of 1000000$"):
    data.load(config(folder), length=10**6, seed=0)


def test_rows_of_one_token_are_refused(folder):
  with pytest.raises(UserError, match=r"^length=1: "):
    data.load(config(folder), length=1, seed=0)


@pytest.mark.parametrize(
  ("kwargs", "told"),
  [
    ({"tokenizer": "words"}, "tokenizer=words: choose bytes, bpe or hf:PATH/tokenizer.json"),
    ({"bpe_vocab": 256}, "bpe_vocab=256: use at least 257"),
    ({"max_bad_records": -1}, "max_bad_records=-1: "),
  ],
)
def test_wrong_fields_are_told(kwargs, told):
  with pytest.raises(UserError) as e:
    data.TextConfig(**kwargs)
  assert str(e.value).startswith(told)


def test_bad_records_beyond_the_config_are_an_error(folder, tmp_path):
  for i in range(3):
    (tmp_path / f"good{i}.txt").write_text(f"text {i}")
  (tmp_path / "broken.txt").write_bytes(b"\xc3(")
  assert data.load(config(tmp_path), length=4, seed=0).info()["bad_records"] == ["broken.txt"]
  with pytest.raises(UserError, match=r"broken\.txt"):
    data.load(config(tmp_path, max_bad_records=0), length=4, seed=0)


def test_config_annotations_are_plain_types():
  hints = typing.get_type_hints(data.TextConfig)
  for field in dataclasses.fields(data.TextConfig):
    hint = hints[field.name]
    assert hint in (int, str, tuple[str, ...], tuple[float, ...])


def test_importing_the_package_is_lean():
  code = "import sys, research.data; print([m for m in %r if m in sys.modules])"
  heavy = ("tensorflow", "torch", "tensorflow_datasets", "pandas", "sklearn", "transformers", "matplotlib", "pyarrow")
  out = subprocess.run([sys.executable, "-c", code % (heavy,)], capture_output=True, text=True, check=True).stdout
  assert out.strip() == "[]"
