"""Every number of a README comes from a committed record, and its commands are the ones that CI runs."""

import json
import pathlib
import re

import numpy as np
import pytest

from research import config

ROOT = pathlib.Path(__file__).parents[1]
RECORDS = sorted(ROOT.glob("experiments/*/records/*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_a_record_says_where_it_comes_from(path):
  record = json.loads(path.read_text())
  assert record["command"].startswith("python -m experiments.")
  assert re.fullmatch("[0-9a-f]{40}", record["commit"]["commit"])
  assert record["commit"]["dirty"] is False
  assert len(record["seeds"]) >= 3
  assert record["hardware"]["cpu"]
  assert path.with_suffix(".png").exists()
  readme = (path.parents[1] / "README.md").read_text()
  assert record["command"] in readme
  assert record["commit"]["commit"][:12] in readme
  assert ", ".join(map(str, record["seeds"])) in readme


@pytest.mark.parametrize("name", ["main", "main_py312"])
def test_language_modelling_numbers_are_the_records(name):
  arms = json.loads((ROOT / f"experiments/kvshift/records/{name}.json").read_text())["results"]["arms"]
  readme = (ROOT / "experiments/kvshift/README.md").read_text()
  for arm in ("plain", "kvshift"):
    losses = list(arms[arm]["validation_loss"].values())
    assert f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}" in readme
  gaps = arms["kvshift"]["minus_plain"]
  assert f"{np.mean(gaps):.4f} ± {np.std(gaps, ddof=1):.4f}".replace("-", "−") in readme
  assert all(gap < 0 for gap in gaps)


def test_induction_numbers_are_the_records():
  arms = json.loads((ROOT / "experiments/kvshift/records/induction.json").read_text())["results"]["arms"]
  readme = (ROOT / "experiments/kvshift/README.md").read_text()
  for arm in ("plain-1", "kvshift-1", "plain-2"):
    accuracies = list(arms[arm]["accuracy"].values())
    assert f"{np.mean(accuracies):.4f} ± {np.std(accuracies, ddof=1):.4f}" in readme
  for arm in ("kvshift-1", "plain-2"):
    assert ", ".join(str(step) for step in arms[arm]["steps_to_99"].values()) in readme


def test_the_readmes_main_command_is_the_one_of_the_record():
  command = json.loads((ROOT / "experiments/kvshift/records/main.json").read_text())["command"]
  assert f".venv/bin/{command}\n" in (ROOT / "README.md").read_text()


def test_commands_in_the_readmes_name_configs_and_fields_that_exist():
  found = 0
  for readme in (ROOT / "README.md", *ROOT.glob("experiments/*/README.md")):
    for spec, rest in re.findall(r"--config=(experiments/\S+\.py\S*)((?: --config\.\S+)*)", readme.read_text()):
      overrides = [item.removeprefix("--config.") for item in rest.split()]
      assert config.load(str(ROOT / spec.strip("`")), [o.strip("`") for o in overrides])
      found += 1
  assert found >= 5


def test_modules_named_in_the_readme_exist():
  modules = set(re.findall(r"python -m ([a-z_.]+)", (ROOT / "README.md").read_text())) - {"pytest", "venv"}
  assert {"experiments.kvshift", "research.tools.params", "benchmarks.train_step"} <= modules
  for module in modules:
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists() or (ROOT / module.replace(".", "/")).is_dir()


def test_benchmark_numbers_are_the_records():
  readme = (ROOT / "benchmarks/README.md").read_text()
  rows = {p.stem: json.loads(p.read_text())["rows"] for p in (ROOT / "benchmarks/records").glob("*.json")}
  ours, eager, compiled = (r["step_ms"] for r in rows["train_step"][:3])
  assert f"{ours:.0f} ms; eager {eager:.0f} ms (ratio {ours / eager:.2f}), torch.compile {compiled:.0f} ms" in readme
  ours, eager, compiled = (r["step_ms"] for r in rows["train_step"][3:])
  assert f"{ours:.1f} ms; eager {eager:.1f} ms ({ours / eager:.2f}), torch.compile {compiled:.1f} ms" in readme
  assert " and ".join(f"{r['tokens_per_s'] / 1e6:.1f}" for r in rows["loader"]) == "35.1 and 32.0"
  assert "35.1 (bytes), 32.0 (BPE)" in readme
  assert f"| {min(r['memory_ratio'] for r in rows['cross_entropy']):.3f} | 0.03 |" in readme
