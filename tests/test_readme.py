"""Every number of a README comes from a committed record; its commands are executed by test_commands.py."""

import json
import pathlib
import re

import numpy as np
import pytest

from benchmarks import lightning_tables
from research.tools import claims

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


def spreads(record) -> set[str]:
  """'mean ± SD', as the reports write it, of every list or {seed: number} in a record."""
  return {f"{mean:.4f} ± {deviation:.4f}".replace("-", "−") for mean, deviation in claims.spreads(record)}


@pytest.mark.parametrize("folder", sorted({p.parents[1] for p in RECORDS}), ids=lambda p: p.name)
def test_every_mean_and_deviation_of_a_readme_is_that_of_a_record_it_names(folder):
  readme = (folder / "README.md").read_text()
  checked = 0
  for line in readme.splitlines():
    told = re.findall(r"−?\d+\.\d{4} ± \d+\.\d{4}", line)
    named = set(re.findall(r"records/(\w+)\.json", line))
    known = set().union(*(spreads(json.loads((folder / f"records/{name}.json").read_text())) for name in named))
    assert set(told) <= known, line
    checked += len(told)
  assert checked > 20 or folder.name != "kvshift"
  assert all(f"records/{p.name}" in readme and f"records/{p.stem}.png" in readme for p in folder.glob("records/*.json"))


CLAIMS = {
  "kvshift": "theor layer width gram hop arithmetic learning+rate seeds variant parameters pod",
  "transnormer": "parameters perplexity position temperature gate activation norm decay length memory overflow pod",
  "prefgames": "sampled shrinks step+size transitive average bias adamw sign argmin token offline inner+products",
}


@pytest.mark.parametrize(("name", "words"), CLAIMS.items())
def test_the_claims_of_a_paper_are_all_there(name, words):
  readme = (ROOT / f"experiments/{name}/README.md").read_text()
  rows = [line for line in readme.split("## Claims")[1].split("\n## ")[0].splitlines() if line.startswith("| ")][2:]
  assert len([row for row in rows if row.count(" | ") == 3]) >= 12
  for word in words.split():
    assert any(word.replace("+", " ") in row.lower() for row in rows), word


@pytest.mark.parametrize("path", [p for p in RECORDS if p.stem == "lengths"], ids=lambda p: p.stem)
def test_speeds_and_memories_by_length_are_the_records(path):
  readme = (path.parents[1] / "README.md").read_text()
  for by_length in json.loads(path.read_text())["results"]["attentions"].values():
    for measured in by_length.values():
      speed = np.mean(list(measured["tokens_per_second"].values()))
      assert f"{speed:,.0f}, {measured['temporaries_mib']:,.0f}" in readme


@pytest.mark.parametrize("path", [p for p in RECORDS if p.stem == "stability"], ids=lambda p: p.stem)
def test_the_tokens_at_which_decoding_is_lost_are_the_records(path):
  readme = (path.parents[1] / "README.md").read_text()
  for head in json.loads(path.read_text())["results"]["heads"]:
    steps = [", ".join(map(str, head[name].values())) for name in ("naive_wrong_from", "naive_not_finite_from")]
    robust = max(head["robust_largest_error"].values())
    assert f"| {head['factor_overflows_at']} | {steps[0]} | {steps[1]} | {robust:.1e} |" in readme


def test_counts_of_steps_are_the_records():
  readme = (ROOT / "experiments/kvshift/README.md").read_text()
  for name in ("induction", "induction_paper"):
    arms = json.loads((ROOT / f"experiments/kvshift/records/{name}.json").read_text())["results"]["arms"]
    for by_seed in (arm["steps_to_99"] for arm in arms.values()):
      if None not in by_seed.values():
        assert ", ".join(map(str, by_seed.values())) in readme, name


def test_the_readmes_main_command_is_the_one_of_the_record():
  command = json.loads((ROOT / "experiments/kvshift/records/main.json").read_text())["command"]
  assert f".venv/bin/{command}\n" in (ROOT / "README.md").read_text()


def test_tables_of_lightning_attention_are_those_of_the_records():
  text = lightning_tables.README.read_text()
  assert all(text.count(f"<!-- {name} -->\n") == 1 for name in lightning_tables.tables())
  assert lightning_tables.filled(text) == text, "python -m benchmarks.lightning_tables"


def test_benchmark_numbers_are_the_records():
  readme = (ROOT / "benchmarks/README.md").read_text()
  rows = {p.stem: json.loads(p.read_text())["rows"] for p in (ROOT / "benchmarks/records").glob("*.json")}
  ours, eager, compiled = (r["step_ms"] for r in rows["train_step"][:3])
  assert f"{ours:.0f} ms; eager {eager:.0f} ms (ratio {ours / eager:.2f}), torch.compile {compiled:.0f} ms" in readme
  ours, eager, compiled = (r["step_ms"] for r in rows["train_step"][3:])
  assert f"{ours:.1f} ms; eager {eager:.1f} ms ({ours / eager:.2f}), torch.compile {compiled:.1f} ms" in readme
  rates = ", ".join(f"{r['tokens_per_s'] / 1e6:.1f} ({r['source']})" for r in rows["loader"])
  assert f"| {rates.replace('bpe', 'BPE')} | 1 |" in readme
  assert f"| {100 * max(r['wait_share'] for r in rows['loader']):.2f} % | 1 % |" in readme
  for row in rows["shift"]:
    times = f"{row['plain_ms']:.1f} -> {row['kvshift_ms']:.1f} ms"
    assert f"| {row['time_ratio']:.3f} ({times}) | 1.02 |" in readme
  assert f"| {min(r['memory_ratio'] for r in rows['cross_entropy']):.3f} | 0.03 |" in readme
