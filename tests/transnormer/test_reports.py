"""Reports of workdirs written by hand: any arms, one seed or several."""

import dataclasses
import json
import math
import pathlib
import typing

import numpy as np
import pytest

from experiments.transnormer.experiment import Config
from experiments.transnormer.reports import REPORTS, ablations, report
from experiments.transnormer.reports.common import label
from research import config, manifest

CONFIGS = pathlib.Path(__file__).parents[2] / "experiments/transnormer/configs"


def workdir(tmp_path, spec, lines, **changes):
  """A finished workdir of `spec` with these lines: (kind, arm, seed, step, {metric: value})."""
  cfg = dataclasses.replace(config.load(str(CONFIGS / spec)), **changes)
  info = {arm: {"bytes_per_token": {"validation": 1.0}} for _, arm, *_ in lines}
  manifest.open_workdir(tmp_path, cfg, str(CONFIGS / spec), [], info, trains=True)
  records = [{"arm": a, "seed": s, "step": t, "kind": kind, "time": 0, **m} for kind, a, s, t, m in lines]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  (tmp_path / "report").mkdir()
  report(tmp_path, cfg)
  assert list((tmp_path / "report").glob("*.png"))
  return json.loads((tmp_path / "report/results.json").read_text())["results"]


def ends(losses):
  return [("eval", arm, seed, 120, {"loss": loss}) for (arm, seed), loss in losses.items()]


def test_every_report_can_be_named():
  assert set(typing.get_args(typing.get_type_hints(Config)["report"])) == set(REPORTS)


def test_every_ablation_of_the_paper_is_an_arm_and_every_arm_has_words():
  arms = [name for name, *_ in config.load(str(CONFIGS / "ablations.py")).arms]
  assert set(arms) - set(ablations.PAPER) == {"decay_paper"}
  assert set(ablations.PAPER) <= set(arms)
  assert all(label(arm) != arm for arm in arms)


def test_ablations_are_in_bits_beside_the_papers(tmp_path, capsys):
  losses = {("base", 0): 1.0, ("base", 1): 1.1, ("ape", 0): 1.2, ("ape", 1): 1.4, ("rms", 0): 1.1, ("rms", 1): 1.0}
  found = workdir(tmp_path, "ablations.py", ends(losses | {("decay_paper", 0): 0.9}))
  assert found["base"] == "base"
  arms = found["arms"]
  assert arms["base"]["loss_bits"] == pytest.approx({"0": 1 / math.log(2), "1": 1.1 / math.log(2)})
  np.testing.assert_allclose(arms["ape"]["minus_base"], np.array([0.2, 0.3]) / math.log(2))
  assert arms["ape"]["paper_gap_bits"] == pytest.approx(0.139)
  assert arms["decay_paper"]["paper_gap_bits"] is None
  told = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")}
  assert "| yes " in told[label("ape")]
  assert "seeds differ" in told[label("rms")]


def test_ablations_without_the_base_are_to_the_first(tmp_path):
  arms = workdir(tmp_path, "ablations.py", ends({("rms", 0): 2.0, ("no_gate", 0): 2.5}))["arms"]
  assert arms["no_gate"]["minus_rms"] == [pytest.approx(0.5 / math.log(2))]
  assert arms["rms"]["parameters"] - arms["no_gate"]["parameters"] > 30_000


def test_the_loss_of_both_architectures_is_compared(tmp_path):
  losses = {("transformer", 0): 2.0, ("transnormer", 0): 1.9}
  arms = workdir(tmp_path, "main.py", ends(losses))["arms"]
  assert arms["transnormer"]["minus_transformer"] == [pytest.approx(-0.1)]


def test_lengths_leave_out_the_step_that_compiles(tmp_path):
  seconds = {"lightning-32": (9.0, 0.5, 0.25, 0.5), "softmax-64": (9.0, 1.0, 1.0, 4.0)}
  lines = [
    ("train", arm, seed, step, {"step_seconds": s})
    for arm, steps in seconds.items()
    for seed in (0, 1)
    for step, s in enumerate(steps)
  ]
  found = workdir(tmp_path, "lengths.py:tiny", lines)
  assert found["tokens_per_batch"] == 512
  attentions = found["attentions"]
  assert attentions["lightning"]["32"]["tokens_per_second"] == {"0": 1024.0, "1": 1024.0}
  assert attentions["softmax"]["64"]["tokens_per_second"] == {"0": 512.0, "1": 512.0}
  assert attentions["softmax"]["64"]["temporaries_mib"] > 0


def test_stability_tells_when_each_form_is_lost(tmp_path):
  found = workdir(tmp_path, "stability.py", ends({("main", 0): 2.0}), seeds=(0,))
  heads = {round(head["decay"], 6): head for head in found["heads"]}
  strongest = heads[round(math.exp(-7), 6)]
  assert strongest["factor_overflows_at"] == 12
  assert 0 < strongest["naive_not_finite_from"]["0"] <= 12
  assert heads[0.9]["factor_overflows_at"] == 842
  assert max(head["robust_largest_error"]["0"] for head in heads.values()) < 1e-5
