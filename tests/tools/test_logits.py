"""The logits tool gives what the weights' own code gives, for any rows, or says in one line why not."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from research import run
from research.tools import logits

GOLDENS = pathlib.Path(__file__).parents[1] / "models" / "goldens"


def call(monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["logits", *map(str, arguments)])
  run.guard(logits.main)


def compute(monkeypatch, tmp_path, tokens, name="llama"):
  np.savez(tmp_path / "in.npz", tokens=tokens)
  paths = [f"--weights={GOLDENS / name}", f"--tokens={tmp_path / 'in.npz'}", f"--out={tmp_path / 'out.npz'}"]
  call(monkeypatch, *paths)
  with np.load(tmp_path / "out.npz") as out:
    assert out.files == ["logits"]
    return out["logits"]


@pytest.mark.parametrize("name", ["llama", "kvshift", "transnormer/scaled", "transnormer/tied"])
def test_the_command_writes_what_the_weights_own_code_computes(name, tmp_path):
  expected = np.load(GOLDENS / name / "expected.npz")
  np.savez(tmp_path / "in.npz", tokens=expected["input_ids"])
  paths = [f"--weights={GOLDENS / name}", f"--tokens={tmp_path / 'in.npz'}", f"--out={tmp_path / 'out'}"]
  done = subprocess.run(
    [sys.executable, "-m", "research.tools.logits", *paths], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  out = np.load(tmp_path / "out")["logits"]
  assert out.dtype == np.float32
  np.testing.assert_allclose(out, expected["logits"], atol=1e-4)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["in.npz", "out"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_a_prefix_and_a_single_token_get_the_same_logits(dtype, monkeypatch, tmp_path):
  expected = np.load(GOLDENS / "llama" / "expected.npz")
  for rows, length in ((1, 1), (2, 9)):
    out = compute(monkeypatch, tmp_path, expected["input_ids"][:rows, :length].astype(dtype))
    np.testing.assert_allclose(out, expected["logits"][:rows, :length], atol=1e-4)


IMAGES = GOLDENS / "images"
LABELS = {"llamagen_gpt_mha": ("tokens", "class_ids"), "var_l2norm": ("gt_BL", "label_B")}


@pytest.mark.parametrize("name", LABELS)
def test_models_of_images_get_the_logits_of_their_own_code(name, monkeypatch, tmp_path):
  expected = np.load(IMAGES / name / "expected.npz")
  tokens, labels = (expected[key] for key in LABELS[name])
  np.savez(tmp_path / "in.npz", tokens=tokens, labels=labels.astype(np.uint8))
  tokenizer = [f"--tokenizer={IMAGES / 'var_vqvae'}"] if name.startswith("var") else []
  paths = [f"--weights={IMAGES / name}", f"--tokens={tmp_path / 'in.npz'}", f"--out={tmp_path / 'out.npz'}"]
  if name.startswith("var"):  # in two goes
    monkeypatch.setattr(logits, "_BYTES", tokens.shape[1] * 32 * 4)
  call(monkeypatch, *paths, *tokenizer)
  np.testing.assert_allclose(np.load(tmp_path / "out.npz")["logits"], expected["logits_cond"], atol=1e-4)


@pytest.mark.parametrize(
  ("name", "arrays", "tokenizer", "told"),
  [
    ("llamagen_gpt_mha", {"tokens": [[1]]}, None, "has no array `labels`; it has tokens"),
    ("llamagen_gpt_mha", {"tokens": [[1]], "labels": [11]}, None, "labels=11: must lie in 0 .. 10"),
    ("llamagen_gpt_mha", {"tokens": [[1]], "labels": [1, 2]}, None, "labels=2: must be one for each of the 1 rows"),
    ("llamagen_gpt_mha", {"tokens": [[1] * 17], "labels": [1]}, None, "tokens=17: an image has 16"),
    ("llamagen_gpt_mha", {"tokens": [[1]], "labels": [[1]]}, None, "[1, 1]: must be [batch], not empty"),
    ("llamagen_gpt_mha", {"tokens": [[1]], "labels": [1]}, "var_vqvae", "only VAR needs it"),
    ("var_l2norm", {"tokens": [[1] * 30], "labels": [1]}, None, "give that of VAR: --tokenizer=DIR"),
    ("var_l2norm", {"tokens": [[1] * 30], "labels": [1]}, "llamagen_vq", "is a llamagen_vq; give that of VAR"),
    ("llamagen_vq", {"tokens": [[1]]}, None, "is a llamagen_vq: a tokenizer has no logits"),
  ],
)
def test_what_models_of_images_need_is_told_in_one_line(name, arrays, tokenizer, told, monkeypatch, tmp_path, capsys):
  np.savez(tmp_path / "in.npz", **arrays)
  more = [f"--tokenizer={IMAGES / tokenizer}"] if tokenizer else []
  stops(monkeypatch, capsys, tmp_path, told, None, IMAGES / name, *more)


def test_rows_computed_in_several_goes_are_the_same(monkeypatch, tmp_path):
  tokens = np.random.default_rng(0).integers(97, size=(5, 6))
  whole = compute(monkeypatch, tmp_path, tokens)
  monkeypatch.setattr(logits, "_BYTES", 2 * 6 * 97 * 4)
  np.testing.assert_allclose(compute(monkeypatch, tmp_path, tokens), whole, atol=2e-6)
  assert whole.shape == (5, 6, 97)


@pytest.mark.parametrize(
  ("arrays", "told"),
  [
    ({"tokens": [[1, 97]]}, "tokens=97: must lie in 0 .. 96"),
    ({"tokens": [[-1, 5]]}, "tokens=-1: must lie in 0 .. 96"),
    ({"tokens": np.array([[2**63]], np.uint64)}, "tokens=9223372036854775808: must lie in 0 .. 96"),
    ({"tokens": [1, 2]}, "[2]: must be [batch, length]"),
    ({"tokens": np.zeros((0, 4), int)}, "[0, 4]: must be [batch, length], not empty"),
    ({"tokens": [[1.0, 2.0]]}, "float64: must be whole numbers"),
    ({"tokens": [[True]]}, "bool: must be whole numbers"),
    ({"tokens": np.array([[None]])}, "is no sound .npz file"),
    ({"ids": [[1]]}, "has no array `tokens`; it has ids"),
    ({}, "has no array `tokens`; it has none"),
  ],
)
def test_unfit_tokens_are_told_in_one_line(arrays, told, monkeypatch, tmp_path, capsys):
  np.savez(tmp_path / "in.npz", **arrays)
  stops(monkeypatch, capsys, tmp_path, told)


@pytest.mark.parametrize(
  ("content", "told"),
  [
    (b"", "is no sound .npz file"),
    (b"abc", "is no sound"),
    (b"PK\x03\x04" + b"x" * 50, "is no sound"),
    (None, "No such"),
  ],
)
def test_a_file_that_is_no_npz_is_told_in_one_line(content, told, monkeypatch, tmp_path, capsys):
  if content is not None:
    (tmp_path / "in.npz").write_bytes(content)
  stops(monkeypatch, capsys, tmp_path, told)


def test_a_single_array_is_told_how_to_be_written(monkeypatch, tmp_path, capsys):
  with (tmp_path / "in.npz").open("wb") as file:
    np.save(file, np.ones((1, 1), int))
  stops(monkeypatch, capsys, tmp_path, "is a single array; write it with numpy.savez")


def test_a_place_that_cannot_be_written_is_told_in_one_line(monkeypatch, tmp_path, capsys):
  np.savez(tmp_path / "in.npz", tokens=[[1]])
  stops(monkeypatch, capsys, tmp_path, "cannot be written: No such file", out=tmp_path / "no" / "out.npz")
  stops(monkeypatch, capsys, tmp_path, "cannot be written: Not a directory", out=tmp_path / "in.npz" / "out.npz")
  (tmp_path / "out").mkdir()
  stops(monkeypatch, capsys, tmp_path, "is a directory", out=tmp_path / "out")
  stops(monkeypatch, capsys, tmp_path, "no such directory", weights=tmp_path / "none")


def stops(monkeypatch, capsys, tmp_path, told, out=None, weights=GOLDENS / "llama", *more):
  before = sorted(tmp_path.iterdir())
  paths = [f"--weights={weights}", f"--tokens={tmp_path / 'in.npz'}", f"--out={out or tmp_path / 'o.npz'}"]
  with pytest.raises(SystemExit) as e:
    call(monkeypatch, *paths, *more)
  assert e.value.code == run.EXIT_USER
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1
  assert lines[0].startswith("error: ")
  assert told in lines[0]
  assert sorted(tmp_path.iterdir()) == before
