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


def stops(monkeypatch, capsys, tmp_path, told, out=None, weights=GOLDENS / "llama"):
  before = sorted(tmp_path.iterdir())
  with pytest.raises(SystemExit) as e:
    call(monkeypatch, f"--weights={weights}", f"--tokens={tmp_path / 'in.npz'}", f"--out={out or tmp_path / 'o.npz'}")
  assert e.value.code == run.EXIT_USER
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1
  assert lines[0].startswith("error: ")
  assert told in lines[0]
  assert sorted(tmp_path.iterdir()) == before
