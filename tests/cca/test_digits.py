"""The one-command story of the digits: stage after stage, from any of which it goes on bit for bit."""

import json
import os
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments.cca import evaluation, stages
from experiments.cca.experiment import build
from research import config, runs, writers
from research.data.text import SPLITS
from research.errors import UserError
from tests import small

DIGITS, VAR = "experiments/cca/configs/digits.py:tiny", "experiments/cca/configs/digits_var.py:tiny"
STAGES = ("tokenizer", "classifier", "judge", "model", "cca-1-0_1")
MORE = (*STAGES, "ddo", "gft")


def start(workdir, spec=DIGITS, arms=STAGES):
  command = [sys.executable, "-m", "experiments.cca", f"--config={spec}", f"--config.only={','.join(arms)}"]
  # one device: an ordinary run, which compiles sooner than one that is cut
  env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
  arguments = ["--config.seeds=0", "--config.log_every=1", f"--workdir={workdir}"]
  return subprocess.Popen([*command, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(workdir, **how):
  process = start(workdir, **how)
  out, err = process.communicate(timeout=900)
  assert process.returncode == 0, err
  return out, err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run of every kind of stage that nothing interrupted."""
  workdir = tmp_path_factory.mktemp("digits") / "run"
  finish(workdir)
  return workdir


def arrays(workdir, run_name):
  """The saved hash of every array of the last step."""
  return json.loads((workdir / "checkpoints" / run_name / "6" / "record" / "data.json").read_text())["content"][
    "arrays"
  ]


def last(workdir, arm):
  records = [r for r in writers.read(workdir / "metrics.jsonl") if r["arm"] == arm and r["kind"] == "eval"]
  return records[-1]


def test_every_stage_is_measured_and_reported(whole):
  told = last(whole, "model")
  for scale in ("0", "3"):
    assert {f"samples/{scale}/{m}" for m in ("frechet", "class_score", "judge_accuracy", "coverage")} <= told.keys()
  assert told["samples/floor/frechet"] < told["samples/ceiling/frechet"]
  tuned = last(whole, "cca-1-0_1")
  assert {"likelihood/nll", "likelihood/nll_null", "likelihood/reward_accuracy", "samples/0/copied"} <= tuned.keys()
  results = json.loads((whole / "report" / "results.json").read_text())["results"]
  assert results["cost"]["forward_tokens"] == {"free": 16, "guided": 32}
  assert results["cost"]["ratio"]["processor"] > 1
  assert {"no guidance", "CFG, s = 3", "CCA, λ = 1, β = 0.1"} <= results["settings"].keys()
  assert results["settings"]["no guidance"]["frechet"]["0"] == told["samples/0/frechet"]
  assert set(results["accuracy"]) == {"classifier", "judge"}
  for name in ("tradeoff", "reconstructions", "samples_model", "samples_model_s3", "samples_cca-1-0_1"):
    assert (whole / "report" / f"{name}.png").stat().st_size > 500


def test_a_tuned_arm_starts_at_its_loss_without_a_difference_and_moves_its_rewards(whole):
  records = [r for r in writers.read(whole / "metrics.jsonl") if r["arm"] == "cca-1-0_1" and r["kind"] == "train"]
  assert records[0]["loss"] == pytest.approx(records[0]["loss_at_start"], abs=1e-4)
  assert records[-1]["drift"] > records[0]["drift"]


@pytest.mark.slow
def test_a_command_goes_on_in_the_middle_of_a_stage_bit_for_bit_and_leaves_the_others(whole, tmp_path):
  shutil.copytree(whole, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "cca-1-0_1-0" / "6")
  told = finish(tmp_path / "run")[1]
  assert told.count("complete at step 6") == len(STAGES) - 1
  assert "cca-1-0_1 seed 0  going on from step 3" in told
  same(tmp_path / "run", whole, STAGES)


@pytest.mark.slow
def test_killed_in_the_middle_of_every_stage_it_ends_the_same(whole, tmp_path):
  shutil.copytree(whole, tmp_path / "whole")
  finish(tmp_path / "whole", arms=MORE)
  for arm in MORE:
    process = start(tmp_path / "run", arms=MORE)
    while not (tmp_path / "run" / "checkpoints" / f"{arm}-0" / "3").is_dir():
      assert process.poll() is None
      time.sleep(0.01)
    process.kill()
    process.wait()
  finish(tmp_path / "run", arms=MORE)
  same(tmp_path / "run", tmp_path / "whole", MORE)


def same(workdir, other, arms):
  for arm in arms:
    assert arrays(workdir, f"{arm}-0") == arrays(other, f"{arm}-0")
    assert last(workdir, arm) == last(other, arm)


@pytest.mark.slow
def test_a_command_that_is_done_changes_nothing_and_reports_again(whole):
  before = [(whole / name).read_bytes() for name in ("metrics.jsonl", "manifest.json")]
  out, told = finish(whole)
  assert told.count("complete at step 6") == len(STAGES)
  assert [(whole / name).read_bytes() for name in ("metrics.jsonl", "manifest.json")] == before
  assert "tradeoff.png" in out


@pytest.mark.slow
def test_the_codes_are_those_of_the_trained_tokenizer_and_the_fakes_are_the_references_own(whole):
  with small.use():
    _, cfg = config.expand(config.load(DIGITS, ["seeds=0", "only=model"]))[0]
    directory = str(whole / "checkpoints" / "tokenizer-0")
    rows = evaluation.codes(directory, cfg.data)["train"]
    book = runs.load(whole, "tokenizer-0")[1].tokenizer
    first = evaluation.real(cfg.data)["train"]["images"][:4]
    np.testing.assert_array_equal(book.encode(first).reshape(4, 16), rows["codes"][:4])
    made = evaluation.fakes(str(whole / "checkpoints" / "model-0"), directory, cfg.data, 0)
    again = evaluation.codes(directory, cfg.data)
    for split in SPLITS:
      assert made[split]["fakes"].shape == again[split]["codes"].shape
    # what a row gets depends on the seed and its place: the first are those of a shorter draw
    model, labels = runs.load(whole, "model-0")[1], rows["labels"][:8]
    np.testing.assert_array_equal(evaluation.draw(model, book, labels, 0.0, 0), made["train"]["fakes"][:8])


@pytest.mark.slow
def test_next_scale_prediction_goes_the_same_way(tmp_path):
  finish(tmp_path / "run", spec=VAR, arms=MORE)
  results = json.loads((tmp_path / "run" / "report" / "results.json").read_text())["results"]
  assert results["cost"]["forward_tokens"] == {"free": 21, "guided": 42}
  assert len(results["settings"]) == 2 + 3
  assert last(tmp_path / "run", "ddo")["drift"] > 0


@pytest.mark.parametrize(
  ("spec", "override", "told"),
  [
    (DIGITS, "vq.vocab=32", "vq.vocab=32: must be llamagen.vocab, 64"),
    (DIGITS, "vq.mult=1,1,1,1", "data.size=4: must be a multiple of 8"),
    (DIGITS, "data.size=16", "codes=16 x 16: must be 4 x 4"),
    (DIGITS, "length=15", "length=15: must be the tokens of an image, 16"),
    (DIGITS, "data.channels=3", "vq.image_channels=1: data has 3"),
    (DIGITS, "llamagen.classes=9", "llamagen.classes=9: digits has 10"),
    (DIGITS, "batch=600", "batch=600: digits has 497 images for validation"),
    (VAR, "vqvae.scales=1,4", r"vqvae.scales=\(1, 4\): must be var.scales, \(1, 2, 4\)"),
    (VAR, "vqvae.code_width=4", "vqvae.code_width=4: must be var.code_width, 8"),
  ],
)
def test_what_does_not_fit_together_is_told_in_one_line_before_anything_is_compiled(spec, override, told):
  _, cfg = config.expand(config.load(spec, [override, "only=model", "accumulate=1"]))[0]
  with small.use(), pytest.raises(UserError, match=told):
    build(cfg).info()


def test_ddo_needs_a_model_that_it_can_draw_from():
  _, cfg = config.expand(config.load(DIGITS, ["only=ddo"]))[0]
  with small.use(), pytest.raises(UserError, match="init_from='': ddo's negatives are drawn"):
    build(config.changed(cfg, ["init_from="]))


def test_of_the_last_rows_only_whole_batches_are_kept():
  rows = stages.Rows({"codes": np.arange(10), "weights": np.ones(10)})
  assert len(stages.Whole(rows, 4)) == 8
  assert jax.tree.map(int, stages.Whole(rows, 4)[7]) == {"codes": 7, "weights": 1}
