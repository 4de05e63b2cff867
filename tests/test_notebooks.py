"""Every notebook runs from top to bottom, and is committed without outputs."""

import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs_and_draws(path, tmp_path, monkeypatch):
  monkeypatch.setenv("WORKDIR", str(tmp_path / "run"))
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
  notebook = nbformat.read(path, as_version=4)
  nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
  outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
  assert len([o for o in outputs if "image/png" in o.get("data", {})]) >= 2
  assert list((tmp_path / "run/checkpoints").iterdir())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_is_committed_as_it_was_written(path):
  for cell in nbformat.read(path, as_version=4).cells:
    assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


def test_there_is_one_for_each_paper():
  assert {"cca", "kvshift", "transnormer"} <= {p.stem for p in NOTEBOOKS}
