"""Every notebook installs what it needs, runs from top to bottom, and is committed without outputs."""

import os
import pathlib
import subprocess
import sys
import sysconfig
import venv

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
PLACEHOLDER = '"set REPOSITORY in the first cell"'

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def code(path):
  """The notebook's cells of code."""
  return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def run_alone(cell, folder, **environment):
  """A cell as a program of its own, in a folder without a checkout."""
  hidden = ("COLAB_TPU", "TPU_ACC")  # of this machine
  env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)} | environment
  return subprocess.run([sys.executable, "-c", cell.source], cwd=folder, env=env, capture_output=True, text=True)


@every_notebook
def test_it_runs_and_draws(path, tmp_path, monkeypatch):
  monkeypatch.setenv("WORKDIR", str(tmp_path / "run"))
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
  notebook = nbformat.read(path, as_version=4)
  nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
  outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
  assert len([o for o in outputs if "image/png" in o.get("data", {})]) >= 2
  if path.stem == "pod":
    told = "".join(o.text for o in outputs if o.output_type == "stream")
    assert "python -m launch.tpu_vm run" in told
    # what is launched is a commit: with changes that are in none a launcher says so, and shows no more
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True).stdout
    assert ("gcloud compute tpus" in told and "xpk workload create" in told) != bool(changed), changed
  else:
    assert list((tmp_path / "run/checkpoints").iterdir())


@every_notebook
def test_it_is_committed_as_it_was_written(path):
  assert all(cell.outputs == [] and cell.execution_count is None for cell in code(path))


def test_there_is_one_for_each_paper_and_one_for_pods():
  papers = {p.parent.name for p in ROOT.glob("experiments/*/experiment.py")}
  assert {p.stem for p in NOTEBOOKS} == papers | {"pod"}


def test_all_begin_with_the_same_short_cell():
  cells = {code(path)[0].source for path in NOTEBOOKS}
  assert len(cells) == 1
  assert cells.pop().count("\n") < 24


def test_outside_a_checkout_one_line_says_what_to_set(tmp_path):
  done = run_alone(code(NOTEBOOKS[0])[0], tmp_path)
  assert done.returncode == 1
  assert done.stderr.splitlines() == [f"fatal: repository '{PLACEHOLDER[1:-1]}' does not exist"]


@pytest.mark.parametrize(("gpu", "variable", "extra"), [(1, "X", "[cuda12]"), (0, "TPU_ACCELERATOR_TYPE", "[tpu]")])
def test_it_installs_for_the_accelerator_that_is_there(gpu, variable, extra, tmp_path):
  (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nexit {1 - gpu}\n")
  (tmp_path / "nvidia-smi").chmod(0o755)
  done = run_alone(
    code(NOTEBOOKS[0])[0], tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", **{variable: "v5litepod-1"}
  )
  assert done.stdout.split() == ["installing", f"./reprise{extra}"]


def test_in_a_checkout_it_only_goes_to_the_root():
  done = run_alone(nbformat.v4.new_code_cell(code(NOTEBOOKS[0])[0].source + "\nprint(os.getcwd())"), ROOT / "notebooks")
  assert (done.stdout, done.stderr) == (f"{ROOT}\n", "")


@pytest.mark.slow
def test_a_notebook_alone_clones_and_installs_and_trains(tmp_path):
  """In an environment that has the requirements but not this package; pip fetches no more than the build's."""
  venv.create(tmp_path / "env", with_pip=True)
  python = tmp_path / "env/bin/python"
  site = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")})
  pathlib.Path(site, "requirements.pth").write_text(sysconfig.get_path("purelib"))
  (tmp_path / "alone").mkdir()
  notebook = nbformat.read(ROOT / "notebooks/kvshift.ipynb", as_version=4)
  first = next(cell for cell in notebook.cells if cell.cell_type == "code")
  assert PLACEHOLDER in first.source
  first.source = first.source.replace(PLACEHOLDER, f'"file://{ROOT}"')  # as a user does
  notebook.cells.append(nbformat.v4.new_code_cell("import research\n\nprint(research.__file__)"))
  nbformat.write(notebook, tmp_path / "alone/kvshift.ipynb")
  env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
  env |= {"WORKDIR": str(tmp_path / "run"), "JAX_NUM_CPU_DEVICES": "1"}
  execute = "from nbclient.cli import main; main()"
  command = [python, "-c", execute, "--output=executed", "kvshift.ipynb"]
  done = subprocess.run(command, cwd=tmp_path / "alone", env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  cells = code(tmp_path / "alone/executed.ipynb")
  assert cells[0].outputs[0].text.startswith("installing ./reprise")
  assert cells[-1].outputs[0].text == f"{tmp_path}/alone/reprise/research/__init__.py\n"
  installed = subprocess.run([python, "-m", "pip", "show", "reprise"], env=env, capture_output=True, text=True).stdout
  assert f"Editable project location: {tmp_path}/alone/reprise" in installed
  assert list((tmp_path / "run/checkpoints").iterdir())
