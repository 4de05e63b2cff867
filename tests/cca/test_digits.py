"""The one-command story of the digits: stage after stage, from any of which it goes on bit for bit."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest

from experiments.cca import evaluation, stages
from experiments.cca.experiment import build
from experiments.cca.reports import report
from research import config, run, runs, writers
from research.errors import UserError
from tests import small

DIGITS, VAR = "experiments/cca/configs/digits.py:tiny", "experiments/cca/configs/digits_var.py:tiny"
STAGES = "tokenizer,classifier,judge,model"
TUNED = ("cca-1-0_5", "ddo")


def command(workdir, spec, arms, monkeypatch):
  overrides = ["seeds=0", f"only={arms}"]
  monkeypatch.setattr(
    sys, "argv", ["x", f"--config={spec}", *(f"--config.{o}" for o in overrides), f"--workdir={workdir}"]
  )
  run.main(build, report)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run of every kind of stage that nothing interrupted."""
  workdir = tmp_path_factory.mktemp("digits") / "run"
  with pytest.MonkeyPatch.context() as monkeypatch:
    command(workdir, DIGITS, ",".join((STAGES, *TUNED)), monkeypatch)
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
  for scale in ("0", "0.5", "3"):
    assert {f"samples/{scale}/{m}" for m in ("frechet", "class_score", "judge_accuracy", "coverage")} <= told.keys()
  assert told["samples/floor/frechet"] < told["samples/ceiling/frechet"]
  tuned = last(whole, "cca-1-0_5")
  assert {"likelihood/nll", "likelihood/nll_null", "likelihood/reward_accuracy", "samples/0/copied"} <= tuned.keys()
  results = json.loads((whole / "report" / "results.json").read_text())["results"]
  assert results["cost"]["forward_tokens"] == {"free": 16, "guided": 32}
  assert results["cost"]["ratio"] > 1
  assert {"no guidance", "CFG, s = 1", "CCA, λ = 1, β = 0.5"} <= results["settings"].keys()
  assert results["settings"]["no guidance"]["frechet"]["0"] == told["samples/0/frechet"]
  assert set(results["accuracy"]) == {"classifier", "judge"}
  for name in ("tradeoff", "reconstructions", "samples_model", "samples_model_s1", "samples_ddo"):
    assert (whole / "report" / f"{name}.png").stat().st_size > 500


def test_a_tuned_arm_starts_at_its_loss_without_a_difference_and_moves_its_rewards(whole):
  records = [r for r in writers.read(whole / "metrics.jsonl") if r["arm"] == "cca-1-0_5" and r["kind"] == "train"]
  assert records[0]["loss"] == pytest.approx(records[0]["loss_at_start"], abs=1e-4)
  assert records[-1]["drift"] > records[0]["drift"]


@pytest.mark.parametrize(
  "arm", ["cca-1-0_5", "ddo", *(pytest.param(a, marks=pytest.mark.slow) for a in ("tokenizer", "judge", "model"))]
)
def test_a_stage_that_stopped_in_its_middle_ends_the_same_bit_for_bit(whole, arm, tmp_path, monkeypatch):
  shutil.copytree(whole, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / f"{arm}-0" / "6")
  command(tmp_path / "run", DIGITS, ",".join((STAGES, *TUNED)), monkeypatch)
  assert arrays(tmp_path / "run", f"{arm}-0") == arrays(whole, f"{arm}-0")
  assert last(tmp_path / "run", arm) == last(whole, arm)


def test_a_command_that_is_done_is_done_again_at_once(whole, monkeypatch, capsys):
  before = (whole / "metrics.jsonl").read_bytes()
  launches = len(json.loads((whole / "manifest.json").read_text())["launches"])
  command(whole, DIGITS, ",".join((STAGES, *TUNED)), monkeypatch)
  assert (whole / "metrics.jsonl").read_bytes() == before
  assert len(json.loads((whole / "manifest.json").read_text())["launches"]) == launches
  assert capsys.readouterr().err.count("complete at step 6") == 6


def test_the_codes_are_those_of_the_trained_tokenizer_and_the_fakes_are_the_references_own(whole):
  with small.use():
    _, cfg = config.expand(config.load(DIGITS, ["seeds=0", "only=ddo"]))[0]
    directory = str(whole / "checkpoints" / "tokenizer-0")
    rows = evaluation.codes(directory, cfg.data)["train"]
    book = runs.load(whole, "tokenizer-0")[1].tokenizer
    first = evaluation.real(cfg.data)["train"]["images"][:4]
    np.testing.assert_array_equal(book.encode(first).reshape(4, 16), rows["codes"][:4])
    made = evaluation.fakes(str(whole / "checkpoints" / "model-0"), directory, cfg.data, 0)
    assert made["train"]["fakes"].shape == rows["codes"].shape
    assert 0 <= made["train"]["fakes"].min() <= made["train"]["fakes"].max() < 64


@pytest.mark.slow
def test_next_scale_prediction_goes_the_same_way(tmp_path, monkeypatch):
  command(tmp_path / "run", VAR, ",".join((STAGES, *TUNED, "gft")), monkeypatch)
  results = json.loads((tmp_path / "run" / "report" / "results.json").read_text())["results"]
  assert results["cost"]["forward_tokens"] == {"free": 21, "guided": 42}
  assert len(results["settings"]) == 8 + 3
  assert last(tmp_path / "run", "ddo")["drift"] > 0


@pytest.mark.parametrize(
  ("spec", "override", "told"),
  [
    (DIGITS, "vq.vocab=32", "vq.vocab=32: must be llamagen.vocab, 64"),
    (DIGITS, "data.size=9", "data.size=9: must be a multiple of 2"),
    (DIGITS, "data.size=16", "codes=8 x 8: must be 4 x 4"),
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
    build(config.freeze(type(cfg), config.override(config.as_configdict(cfg), type(cfg), ["init_from="])))


def test_of_the_last_rows_only_whole_batches_are_kept():
  rows = stages.Rows({"codes": np.arange(10), "weights": np.ones(10)})
  assert len(stages.Whole(rows, 4)) == 8
  assert jax.tree.map(int, stages.Whole(rows, 4)[7]) == {"codes": 7, "weights": 1}
