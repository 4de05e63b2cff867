"""Reports of workdirs written by hand: what is counted, what diverged, what is missing."""

import dataclasses
import json
import math
import pathlib
import typing

import numpy as np
import pytest

from experiments.kvshift.experiment import Config
from experiments.kvshift.reports import REPORTS, report
from experiments.kvshift.reports.common import label
from experiments.kvshift.reports.learned import counts
from research import config, manifest
from research.comparison import parameters
from tests import small

CONFIGS = pathlib.Path(__file__).parents[2] / "experiments/kvshift/configs"


def workdir(tmp_path, spec, lines, train=(), **changes):
  """A finished workdir of `spec` with these eval lines: (arm, seed, step, {metric: value})."""
  cfg = dataclasses.replace(config.load(str(CONFIGS / spec)), **changes)
  info = {"main": {"source": "by hand"}}
  manifest.open_workdir(tmp_path, cfg, str(CONFIGS / spec), [], info, trains=True)
  records = [{"arm": a, "seed": s, "step": t, "kind": "eval", "time": 0, **m} for a, s, t, m in lines] + list(train)
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  (tmp_path / "report").mkdir()
  report(tmp_path, cfg)
  assert list((tmp_path / "report").glob("*.png"))
  return json.loads((tmp_path / "report/results.json").read_text())["results"]


def test_every_report_can_be_named():
  assert set(typing.get_args(typing.get_type_hints(Config)["report"])) == set(REPORTS)


def test_accuracy_tells_the_end_and_when_99_percent_was_first_seen(tmp_path, capsys):
  lines = [
    ("kvshift-1", s, t, {"accuracy": a, "loss": 1.0})
    for s in (0, 1)
    for t, a in ((0, 0.1), (50, 0.99 + s / 100), (100, 0.98))
  ]
  lines += [("plain-1", 0, t, {"accuracy": 0.1, "loss": 1.0}) for t in (0, 50, 100)]
  arms = workdir(tmp_path, "induction.py", lines)["arms"]
  assert arms["kvshift-1"] == {"accuracy": {"0": 0.98, "1": 0.98}, "steps_to_99": {"0": 50, "1": 50}}
  assert arms["plain-1"]["steps_to_99"] == {"0": None}
  told = capsys.readouterr().out
  assert "KV shifting, 1 " in told
  assert "never" in told


def test_a_sweep_has_each_arm_at_its_setting_and_says_what_diverged(tmp_path, capsys):
  losses = {
    ("plain-0", 0): 2.0,
    ("plain-0", 1): 2.2,
    ("plain-2", 0): math.nan,
    ("plain-2", 1): 3.0,
    ("kvshift-0", 0): 1.9,
  }
  lines = [(arm, seed, 150, {"loss": None if math.isnan(v) else v}) for (arm, seed), v in losses.items()]
  arms = workdir(tmp_path, "robustness.py", lines)["arms"]
  assert {name: arm["tx.lr"] for name, arm in arms.items()} == {"plain-0": 1e-3, "plain-2": 1e-1, "kvshift-0": 1e-3}
  assert arms["plain-0"]["loss"] == {"0": 2.0, "1": 2.2}
  told = capsys.readouterr().out
  report(
    tmp_path, dataclasses.replace(config.load(str(CONFIGS / "robustness.py")), only=("plain-0",))
  )  # still all arms
  assert "0.1 " in capsys.readouterr().out
  assert "2.1000 ± 0.1414" in told
  assert "3.0000 (1 of 2 diverged)" in told


def test_a_run_that_left_out_updates_has_diverged(tmp_path, capsys):
  lines = [("plain-0", seed, 120, {"loss": 5.5}) for seed in (0, 1)]
  train = [{"arm": "plain-0", "seed": 1, "step": 7, "kind": "train", "time": 0, "loss": None}]
  arms = workdir(tmp_path, "robustness.py", lines, train=train)["arms"]
  assert arms["plain-0"]["loss"]["0"] == 5.5
  assert arms["plain-0"]["loss"]["1"] is None
  assert "5.5000 (1 of 2 diverged)" in capsys.readouterr().out


def test_gaps_are_taken_seed_by_seed(tmp_path, capsys):
  ends = {("plain", 0): 2.0, ("plain", 1): 3.0, ("kvshift", 0): 1.9, ("kvshift", 1): 2.8, ("conv", 0): 2.1}
  lines = [(arm, seed, 150, {"loss": v}) for (arm, seed), v in ends.items()]
  arms = workdir(tmp_path, "variants.py", lines)["arms"]
  np.testing.assert_allclose(arms["kvshift"]["minus_plain"], [-0.1, -0.2])
  np.testing.assert_allclose(arms["conv"]["minus_plain"], [0.1])
  assert arms["kvshift"]["extra_parameters"] == 2 * 4 * 4  # layers, heads, coefficients
  assert "-0.1500 ± 0.0707" in capsys.readouterr().out


def test_gaps_without_a_plain_arm_are_to_the_first(tmp_path):
  arms = workdir(tmp_path, "variants.py", [("gate", 0, 150, {"loss": 2.0}), ("clip", 0, 150, {"loss": 2.5})])["arms"]
  assert arms["clip"]["minus_gate"] == [0.5]


def test_groups_are_read_from_the_metrics_there_are(tmp_path):
  ends = {f"accuracy_{k}": 1 / k for k in (1, 2, 10)}
  arms = workdir(tmp_path, "hops.py", [("plain", 0, 1, {"loss": 1.0, "accuracy": 0.5, **ends})])["arms"]
  assert arms["plain"] == {"accuracy_1": {"0": 1.0}, "accuracy_2": {"0": 0.5}, "accuracy_10": {"0": 0.1}}


def test_the_four_cases_are_those_of_the_papers_table():
  # (previous, current) of four heads: a1 > a2 in the first and third, b1 > b2 in the first two
  key = np.array([[[0.1, 0.9], [0.9, 0.1], [0.2, 0.3], [0.5, 0.5]]])
  value = np.array([[[0.0, 1.0], [0.4, 0.6], [1.0, 0.0], [0.7, 0.3]]])
  assert counts((key, value)) == (1, 1, 1, 1)
  assert counts((key[:, :1], value[:, :1])) == (1, 0, 0, 0)


def test_non_embedding_parameters_are_those_of_the_layers_and_the_last_norm():
  cfg = dataclasses.replace(config.load(str(CONFIGS / "main.py")), model=small.MODEL)
  plain = dataclasses.replace(cfg, attention="plain")
  m = small.MODEL
  layer = m.width * (m.heads + 2 * m.kv_heads) * m.head_dim + m.heads * m.head_dim * m.width + 3 * m.width * m.mlp_width
  assert parameters(plain) == m.layers * (layer + 2 * m.width) + m.width
  assert parameters(cfg) == parameters(plain) + 4 * m.kv_heads * m.layers
  assert parameters(cfg, ("embed", "head", "mix")) == parameters(plain)


@pytest.mark.parametrize(("arm", "words"), [("kvshift-1", "KV shifting, 1"), ("canon", "Canon-B"), ("main", "main")])
def test_arms_are_told_in_words(arm, words):
  assert label(arm) == words
