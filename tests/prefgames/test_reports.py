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


def test_the_pipeline_on_text_is_told_by_stage_and_by_pairs_of_methods(tmp_path, capsys):
  wins = {"wins/prompts": 100}
  for a, b, rate in (("sft", "egpo", 0.44), ("sft", "online_dpo", 0.49), ("egpo", "online_dpo", 0.53)):
    wins |= {f"wins/rate/{a}/{b}": rate, f"wins/rate/{b}/{a}": 1 - rate}
    wins |= {f"wins/error/{a}/{b}": 0.016, f"wins/error/{b}/{a}": 0.016}
  for a in ("sft", "egpo", "online_dpo"):
    wins |= {f"wins/rate/{a}/{a}": 0.5, f"wins/error/{a}/{a}": 0.0}
  lines = [("sft", 0, t, {"loss": 5.0 / (1 + t)}) for t in (0, 80, 160)]
  lines += [("judge", 0, t, {"loss": 0.7, "accuracy": 0.5 + t / 600}) for t in (0, 80, 160, 240)]
  for i, arm in enumerate(("egpo", "online_dpo")):
    lines += [(arm, 0, t, {"loss": 1.0, "win_rate": 0.5 + t * (2 - i) / 2000}) for t in (0, 30, 60)]
  results = workdir(tmp_path, "text.py", [*lines, ("tournament", 0, 1, {"loss": 0.7, "accuracy": 0.9} | wins)])
  assert results["arms"]["egpo"]["queries"] == 4 * 32 * 60
  assert results["arms"]["online_dpo"]["queries"] == 32 * 60
  assert results["arms"]["judge"]["accuracy"] == {"0": 0.9}
  assert results["tournament"]["egpo"]["sft"] == {"rate": {"0": 0.56}, "error": {"0": 0.016}}
  told = capsys.readouterr().out
  assert "56.0 ± 1.6 %" in told
  assert "prefers the chosen one: 0.9000" in told
