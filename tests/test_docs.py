"""The worked example of the documentation is written down as it stands, is short, and runs."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs/adding_an_experiment.md"


@pytest.fixture
def copy(tmp_path):
  """A checkout with the example's files in their places."""
  shutil.copytree(ROOT / "research", tmp_path / "research", ignore=shutil.ignore_patterns("__pycache__"))
  for name in (
    "tests/__init__.py",
    "tests/conftest.py",
    "tests/test_contracts.py",
    "experiments/__init__.py",
    "setup.cfg",
  ):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / name, tmp_path / name)
  for name, text in example().items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  for name in re.findall(r"`(experiments/\S+__init__\.py)`", PAGE.read_text()):
    (tmp_path / name).touch()
  return tmp_path


def example() -> dict[str, str]:
  """{path: text} of the files that the page shows."""
  return dict(re.findall(r"```\w+\n# (experiments/\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL))


def test_a_whole_experiment_is_less_than_a_hundred_lines():
  files = example()
  assert set(files) == {
    f"experiments/cautious/{p}" for p in ("experiment.py", "__main__.py", "configs/main.py", "README.md")
  }
  assert sum(len([line for line in text.splitlines() if line]) for text in files.values()) < 100


def test_the_example_trains_and_draws_its_figure(copy):
  (command,) = re.findall(r"^python (-m experiments.cautious \S+:tiny .*)$", PAGE.read_text(), re.MULTILINE)
  command = [sys.executable, *command.split(), "--config.seeds=0"]
  done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(copy)})
  assert done.returncode == 0, done.stderr
  assert "| cautious" in done.stdout
  assert (copy / "runs/cautious/report/validation_loss.png").exists()
  subprocess.run(
    [sys.executable, "-m", "ruff", "check", "--config", ROOT / "ruff.toml", "experiments"], cwd=copy, check=True
  )


@pytest.mark.slow
def test_the_contract_covers_the_example(copy):
  command = [
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-p",
    "no:cacheprovider",
    "tests/test_contracts.py",
    "-k",
    "cautious",
  ]
  done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(copy)})
  assert done.returncode == 0, done.stdout
