"""Imports point one way: experiments and launch to research, and inside it upwards from the kernels."""

import ast
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(p.relative_to(ROOT) for top in ("research", "launch", "experiments") for p in (ROOT / top).rglob("*.py"))

# what a folder or file may import of the project, beside itself
BELOW_KERNELS = {"research.errors", "research.mesh", "research.hardware"}


OURS = {"research", "launch", "experiments", "tests", "benchmarks"}


def modules(path: pathlib.Path) -> set[str]:
  """What a file imports, wherever in it."""
  found = set()
  for node in ast.walk(ast.parse((ROOT / path).read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: write the whole name"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def imported(path: pathlib.Path) -> set[str]:
  """Modules of the project that a file imports."""
  return {name for name in modules(path) if name.split(".")[0] in OURS}


def third_party(path: pathlib.Path) -> set[str]:
  """The packages of others that a file imports."""
  return {name.split(".")[0] for name in modules(path)} - OURS - set(sys.stdlib_module_names)


def of(*folder: str) -> list[pathlib.Path]:
  return [path for path in FILES if path.parts[: len(folder)] == folder]


def starts(name: str, *prefixes: str) -> bool:
  return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def astray(files: list[pathlib.Path], *allowed: str) -> dict[str, list[str]]:
  """{file: what it imports of the project beyond `allowed`}."""
  wrong = {str(path): [name for name in imported(path) if not starts(name, *allowed)] for path in files}
  return {path: names for path, names in wrong.items() if names}


def test_research_knows_no_experiment_and_no_launcher():
  assert len(of("research")) > 80
  assert astray(of("research"), "research") == {}
  papers = [f"experiments.{p.parent.name}" for p in ROOT.glob("experiments/*/__main__.py")]
  assert [str(p) for p in of("research") if any(paper in (ROOT / p).read_text() for paper in papers)] == []


def test_kernels_import_nothing_above_them():
  assert astray(of("research", "kernels"), "research.kernels", *BELOW_KERNELS) == {}


def test_layers_import_kernels_and_no_model():
  assert astray(of("research", "nn"), "research.kernels", "research.nn", *BELOW_KERNELS) == {}


# what runs, keeps, writes and tells of what a model computes
ABOVE_MODELS = ("research.fit", "research.run", "research.runs", "research.config", "research.checkpoint")
ABOVE_MODELS += ("research.writers", "research.report", "research.comparison", "research.tools", "research.evals")


def test_models_know_no_loop_no_data_no_report_and_no_tool():
  above = (*ABOVE_MODELS, "research.data")
  assert [str(p) for p in of("research", "models") if any(starts(name, *above) for name in imported(p))] == []


def test_evaluations_know_models_and_data_but_no_loop_and_no_report():
  above = tuple(name for name in ABOVE_MODELS if name != "research.evals")
  assert [str(p) for p in of("research", "evals") if any(starts(name, *above) for name in imported(p))] == []


def test_a_paper_imports_no_other_paper_and_no_launcher():
  for paper in {path.parts[1] for path in of("experiments") if len(path.parts) > 2}:
    assert astray(of("experiments", paper), "research", f"experiments.{paper}") == {}


def test_launchers_find_experiments_by_name_only():
  assert astray(of("launch"), "research", "launch") == {}


ONLY = {"orbax": "research/checkpoint.py", "grain": "research/data/", "tensorflow_datasets": "research/data/"}


@pytest.mark.parametrize(("package", "where"), ONLY.items())
def test_libraries_that_change_often_stand_in_one_place(package, where):
  using = [str(p) for p in FILES if re.search(rf"(import|from) {package}\b", (ROOT / p).read_text())]
  assert using
  assert [path for path in using if not path.startswith(where)] == []


def test_no_file_has_outgrown_its_one_reason():
  everything = [
    p for top in ("research", "experiments", "launch", "benchmarks", "tests") for p in (ROOT / top).rglob("*.py")
  ]
  lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in everything}
  assert len(lines) > 300
  assert {path: n for path, n in lines.items() if n > 450} == {}
