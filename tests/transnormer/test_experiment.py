"""One experiment, two architectures: their sizes, their text, and the tools that open either."""

import dataclasses
import importlib
import json
import pathlib
import subprocess
import sys

import pytest

from experiments.transnormer.experiment import Config, build, peer
from research import comparison, config
from research.errors import UserError
from research.models.transnormer import TransNormerConfig
from tests import small

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = ROOT / "experiments/transnormer/configs"


@pytest.mark.parametrize("name", ["main", "wikitext103"])
def test_arms_have_equal_parameters_tokens_data_and_optimiser_but_for_its_rate(name):
  transformer, transnormer = (
    single for _, single in config.expand(config.load(str(CONFIGS / f"{name}.py"), ["seeds=0"]))
  )
  assert dataclasses.replace(transformer, architecture="transnormer", tx=transnormer.tx) == transnormer
  assert dataclasses.replace(transformer.tx, lr=transnormer.tx.lr) == transnormer.tx
  assert comparison.parameters(transformer, ()) == pytest.approx(comparison.parameters(transnormer, ()), rel=0.01)


def test_the_setting_of_45m_parameters_has_them():
  arms = config.expand(config.load(str(CONFIGS / "wikitext103.py"), ["seeds=0"]))
  for (_, single), published in zip(arms, (44.65e6, 45.45e6), strict=True):
    assert comparison.parameters(single, ()) == pytest.approx(published, rel=0.02)


def test_without_its_gate_the_peer_has_nothing_to_make_up_for():
  assert peer(TransNormerConfig(gate=False, glu_width=384)).mlp_width == 384
  assert peer(TransNormerConfig(heads=6, head_dim=16, glu_width=384)).mlp_width == 416


@pytest.mark.parametrize("architecture", ["transnormer", "transformer"])
def test_a_mesh_that_does_not_fit_is_told_of_either(architecture):
  cfg = Config(architecture=architecture, model=TransNormerConfig(heads=3), mesh=small.MeshConfig(1, 2, 2))
  with small.use(cfg.mesh, devices=4), pytest.raises(UserError, match="heads=3: must divide by mesh.model=2"):
    build(cfg)


@pytest.mark.slow
def test_the_tools_take_a_run(tmp_path, monkeypatch, capsys):
  def call(tool, *arguments):
    monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
    capsys.readouterr()
    importlib.import_module(tool).main()
    return capsys.readouterr().out

  (tmp_path / "text").mkdir()
  for i in range(40):
    (tmp_path / "text" / f"{i}.txt").write_text(f"The number {i} and its square {i * i}. It is raining again.\n" * 5)
  command = [sys.executable, "-m", "experiments.transnormer", f"--config={CONFIGS}/main.py:tiny", "--config.seeds=0"]
  command += ["--config.only=transnormer", "--config.steps=3", f"--config.data.source=files:{tmp_path}/text"]
  subprocess.run([*command, f"--workdir={tmp_path}/run"], check=True, cwd=ROOT, capture_output=True)
  told = call("research.tools.evaluate", f"--workdir={tmp_path}/run", f"--out={tmp_path}/numbers.json")
  assert "bits_per_byte" in told
  assert json.loads((tmp_path / "numbers.json").read_text())["induction"].keys() == {"nats_first", "nats_second"}
  call("research.tools.export", f"--workdir={tmp_path}/run", f"--out={tmp_path}/published")
  asked = ["--prompt=The num", "--tokens=6", "--temperature=0"]
  mine = call("research.tools.generate", f"--workdir={tmp_path}/run", *asked)
  assert mine.startswith("The num")
  assert call("research.tools.generate", f"--weights={tmp_path}/published", "--tokenizer=bytes", *asked) == mine
