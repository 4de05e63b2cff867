"""What every experiment and every config promises. New ones are found, not listed."""

import dataclasses
import json
import pathlib
import re
import runpy
import sys

import jax
import pytest

from research import config, manifest, run, writers
from research.config import RunConfig
from research.fit import Experiment, abstract_state
from research.mesh import abstract_mesh, least_devices
from research.tools import params

ROOT = pathlib.Path(__file__).parents[1]
EXPERIMENTS = sorted(p.parent for p in ROOT.glob("experiments/*/experiment.py"))
CONFIGS = sorted(p.relative_to(ROOT) for p in ROOT.glob("experiments/*/configs/*.py") if p.name != "__init__.py")

every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parts[1]}-{p.stem}")

# A config file may name arguments of its own that are worth the same tests: ARGS = ("big", "sweep=lr").
SPECS = [
  f"{path}:{arg}".removesuffix(":")
  for path in CONFIGS
  for arg in ("", *runpy.run_path(str(ROOT / path)).get("ARGS", ()))
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.split("configs/")[1])


def test_experiments_and_configs_are_found():
  assert [p.name for p in EXPERIMENTS] == sorted({p.parts[1] for p in CONFIGS})
  assert {"kvshift", "transnormer"} <= {p.name for p in EXPERIMENTS}


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda p: p.name)
def test_an_experiment_is_a_folder_with_its_parts(folder):
  module = config.experiment_module(folder.name)
  assert issubclass(module.Config, RunConfig)
  assert module.Config().experiment == folder.name
  assert callable(module.build)
  assert (folder / "__main__.py").exists()
  assert (folder / "README.md").exists()


def test_the_library_knows_no_papers_experiment():
  # not the bare name: a model of the zoo may be called as the paper whose experiment it serves
  names = "|".join(p.name for p in EXPERIMENTS)
  for file in (ROOT / "research").rglob("*.py"):
    assert not re.findall(rf"experiments[./]({names})\b", file.read_text()), file


@every_config
def test_a_config_is_short_and_says_what_it_is(path):
  text = (ROOT / path).read_text()
  assert text.count("\n") < 100
  assert text.startswith('"""')
  assert "python -m experiments." in text  # the command
  assert "Cost:" in text


@every_spec
def test_the_full_size_step_traces_without_a_device(spec):
  whole = config.load(spec)
  for _, cfg in config.expand(dataclasses.replace(whole, seeds=whole.seeds[:1])):
    with jax.sharding.use_abstract_mesh(abstract_mesh(cfg.mesh, least_devices(cfg.mesh))):
      exp = config.experiment_module(cfg.experiment).build(cfg)
      assert isinstance(exp, Experiment)
      state = abstract_state(exp)
      assert sum(x.size for x in jax.tree.leaves(state.model)) > 0
      assert sum(exp.flops_per_token.values()) > 0


@every_spec
def test_the_parameter_table_adds_up(spec, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["params", f"--config={spec}"])
  params.main()
  told = capsys.readouterr().out
  for arm, cfg in config.expand(config.load(spec)):
    if cfg.seed == config.load(spec).seed:
      table = told.split(f"arm {arm}:")[1].split("\n\n")[1].splitlines()[2:]
      counts = [int(row.split("|")[-2].replace(",", "")) for row in table]
      assert sum(counts[:-1]) == counts[-1] > 0


@every_config
def test_tiny_takes_two_steps_and_writes_its_report(path, monkeypatch, tmp_path, capsys):
  cfg = config.load(f"{path}:tiny")
  module = __import__(f"experiments.{cfg.experiment}.__main__", fromlist=["build", "report"])
  overrides = ["steps=3", f"seeds={cfg.seed}", f"only={','.join(name for name, *_ in cfg.arms[:2])}"]
  cfg = config.load(f"{path}:tiny", overrides)
  monkeypatch.setattr(
    sys, "argv", ["x", f"--config={path}:tiny", *(f"--config.{o}" for o in overrides), f"--workdir={tmp_path}"]
  )
  run.main(module.build, module.report)
  records = writers.read(tmp_path / "metrics.jsonl")
  for arm, single in config.expand(cfg):
    mine = [r for r in records if r["arm"] == arm and r["seed"] == single.seed]
    if single.seed == cfg.seed:
      trained = [r for r in mine if r["kind"] == "train"]
      assert trained[-1]["step"] == 2
      assert {"loss", "grad_norm", "update_norm", "lr", "tokens_per_second", "step_seconds"} <= trained[0].keys()
      assert [r["step"] for r in mine if r["kind"] == "eval"] == ([0, 3] if cfg.eval_every else [3])
      assert (tmp_path / "checkpoints" / f"{arm}-{single.seed}" / "3").is_dir()
  assert list((tmp_path / "report").glob("*.png"))
  assert list((tmp_path / "tensorboard").rglob("events.*"))
  results = json.loads((tmp_path / "report" / "results.json").read_text())
  assert {"command", "commit", "seeds", "hardware", "results"} <= results.keys()
  about = json.loads((tmp_path / "manifest.json").read_text())
  assert about["config"] == json.loads(json.dumps(config.flat(cfg)))
  assert results["command"].startswith(f"python -m experiments.{cfg.experiment} --config={path}:tiny --config.steps=3")
  assert {"argv", "overrides", "versions", "devices", "git", "python", "time"} <= about["launches"][0].keys()
  assert "report" in capsys.readouterr().out


def test_the_manifest_says_what_text_was_read(tmp_path, monkeypatch):
  main = "experiments/kvshift/configs/main.py:tiny"
  module = config.experiment_module("kvshift")
  _, single = config.expand(config.load(main))[0]
  _, exp = run.prepare(module.build, single)
  manifest.open_workdir(tmp_path, single, main, [], {"main": exp.info()}, trains=True)
  data = json.loads((tmp_path / "manifest.json").read_text())["data"]["main"]
  assert set(data["sha256"]) == {"train", "validation"}
  assert data["bytes"]["train"] > 5_000_000


def test_no_secret_of_the_environment_reaches_the_workdir(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "canary-7f3a")
  path = "experiments/kvshift/configs/induction.py:tiny"
  arguments = [f"--config={path}", "--config.only=plain-1", "--config.seeds=0", f"--workdir={tmp_path}"]
  monkeypatch.setattr(sys, "argv", ["x", *arguments])
  module = __import__("experiments.kvshift.__main__", fromlist=["build", "report"])
  run.main(module.build, module.report)
  files = [p for p in tmp_path.rglob("*") if p.is_file()]
  assert len(files) > 10
  assert not [p for p in files if b"canary-7f3a" in p.read_bytes()]
