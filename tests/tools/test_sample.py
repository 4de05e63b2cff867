"""What is wrong with a request for samples is told in one line, before anything is drawn."""

import pathlib
import sys

import numpy as np
import pytest

from research.errors import UserError
from research.tools import sample

GOLDENS = pathlib.Path(__file__).parents[1] / "models" / "goldens" / "images"
LLAMAGEN = ["--weights", str(GOLDENS / "llamagen_gpt_mha"), "--tokenizer", str(GOLDENS / "llamagen_vq")]
VAR = ["--weights", str(GOLDENS / "var_l2norm"), "--tokenizer", str(GOLDENS / "var_vqvae")]


@pytest.mark.parametrize(
  ("argv", "words"),
  [
    ([*LLAMAGEN, "--labels=11"], r"labels=\[11\]: classes lie in 0 \.\. 9, and 10 is the null class"),
    ([*LLAMAGEN, "--labels=a,b"], "use random, even, or numbers"),
    ([*LLAMAGEN, "--labels=even", "--samples=7"], "must be a multiple of the 10 classes"),
    ([*LLAMAGEN, "--scale=-1"], "scale=-1"),
    ([*LLAMAGEN, "--top_p=0"], "top_p=0"),
    ([*LLAMAGEN, "--batch=0"], "batch=0"),
    ([*LLAMAGEN, "--run=cca-0"], "goes with --workdir"),
    ([*LLAMAGEN[:2], *VAR[2:]], "LlamaGen writes codes of a VQ"),
    ([*VAR[:2], *LLAMAGEN[2:]], "VAR writes codes of a VQVAE"),
    ([*VAR[:2], "--tokenizer", str(GOLDENS / "var_l2norm")], "give the tokenizer's weights"),
    (["--weights", str(GOLDENS / "llamagen_vq"), *LLAMAGEN[2:]], "give a model that writes images"),
    (["--weights=/nowhere.pt", *LLAMAGEN[2:]], "/nowhere.pt"),
  ],
)
def test_a_wrong_argument_is_one_line(argv, words, tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["sample", *argv, f"--out={tmp_path / 's.npz'}"])
  with pytest.raises(UserError, match=words) as error:
    sample.main()
  assert "\n" not in str(error.value)
  assert not list(tmp_path.iterdir())


def test_labels_are_spread_as_asked():
  args, _ = sample.parse([*LLAMAGEN, "--out=x", "--labels=even", "--samples=20"])
  assert sample.choose_labels(args, 10).tolist() == [n for n in range(10) for _ in range(2)]
  args, _ = sample.parse([*LLAMAGEN, "--out=x", "--samples=5000", "--seed=3"])
  drawn = sample.choose_labels(args, 10)
  assert (np.bincount(drawn, minlength=10) > 400).all()
  assert (drawn == sample.choose_labels(args, 10)).all()
