"""Reports of workdirs written by hand."""

import dataclasses
import json
import pathlib
import typing

from experiments.prefgames.experiment import Config
from experiments.prefgames.reports import REPORTS, report
from research import config, manifest

CONFIGS = pathlib.Path(__file__).parents[2] / "experiments/prefgames/configs"


def workdir(tmp_path, spec, lines, **changes):
  """The results of a finished workdir of `spec` with these eval lines: (arm, seed, step, {metric: value})."""
  cfg = dataclasses.replace(config.load(str(CONFIGS / spec)), **changes)
  manifest.open_workdir(tmp_path, cfg, str(CONFIGS / spec), [], {"main": {"source": "by hand"}}, trains=True)
  records = [{"arm": a, "seed": s, "step": t, "kind": "eval", **m} for a, s, t, m in lines]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  (tmp_path / "report").mkdir()
  report(tmp_path, cfg)
  assert list((tmp_path / "report").glob("*.png"))
  return json.loads((tmp_path / "report/results.json").read_text())["results"]


def test_every_report_can_be_named():
  assert set(typing.get_args(typing.get_type_hints(Config)["report"])) == set(REPORTS)


def test_gaps_are_told_at_the_end_with_the_share_that_failed(tmp_path, capsys):
  values = lambda gap, failed: {
    f"{k}/{w}": v for k in ("uniform", "transitive") for w, v in (("gap", gap), ("failed", failed))
  }
  lines = [("egpo-b1e-1", s, t, values(g, 0.0)) for s in (0, 1) for t, g in ((0, 0.1), (100, 1e-9))]
  lines += [("nash_md_pg-b1e-1", s, t, values(0.1, 0.25 + s / 2)) for s in (0, 1) for t in (0, 100)]
  arms = workdir(tmp_path, "tabular.py", lines)["arms"]
  assert arms["egpo-b1e-1"]["median_gap"]["uniform"] == {"0": 1e-9, "1": 1e-9}
  assert arms["egpo-b1e-1"]["updates"] == 1000
  assert arms["nash_md_pg-b1e-1"]["failed"]["transitive"] == {"0": 0.25, "1": 0.75}
  told = capsys.readouterr().out
  assert "0.5000 ± 0.3536" in told
  assert "1e-09 to 1e-09" in told


def test_runs_that_never_get_there_are_told_as_never(tmp_path, capsys):
  found = {
    f"runs/{w}@{b}": v for b in ("0.03", "0.02", "0.015") for w, v in (("succeeded", 0.25), ("comparisons", None))
  }
  results = workdir(tmp_path, "xpo_bandit.py", [("dpo_own-8", s, 100, found) for s in (0, 1, 2)])
  assert results["arms"]["dpo_own-8"]["comparisons"]["0.03"] == {"0": None, "1": None, "2": None}
  told = capsys.readouterr().out
  assert "never, never, never" in told
  assert "0.2500 ± 0.0000" in told


def test_an_optimiser_is_shown_at_its_best_rate(tmp_path):
  single = config.expand(config.load(str(CONFIGS / "optimisers.py")))[0][1]
  lines = []
  for t in (0, 100):
    found = {f"cycle/gap@{r:g}": 1.0 if r != 0.001 else 1e-6 for r in single.table.rates}
    found |= {f"cycle/failed@{r:g}": float(r != 0.001) for r in single.table.rates}
    lines.append(("egpo-sgd", 0, t, found))
  arm = workdir(tmp_path, "optimisers.py", lines)["arms"]["egpo-sgd"]
  assert arm["best_rate"] == 0.001
  assert arm["median_gap"] == {"0": 1e-6}
