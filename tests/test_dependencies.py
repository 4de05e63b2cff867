"""setup.cfg asks for what is imported, gives a reason for each, and asks for nothing else."""

import configparser
import importlib.metadata
import pathlib
import re

from tests.test_imports import FILES, third_party

ROOT = pathlib.Path(__file__).parents[1]
# imported where the extra `gcs` is there, and nowhere else
OF_EXTRAS = {"fsspec"}
# tensorflow-datasets imports it without asking for it
FOR_OTHERS = {"importlib-resources"}


def required() -> list[str]:
  parser = configparser.ConfigParser(comment_prefixes=("#",))
  parser.read(ROOT / "setup.cfg")
  return parser["options"]["install_requires"].split("\n")[1:]


def normal(name: str) -> str:
  return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def test_what_is_imported_is_asked_for_and_nothing_else_is():
  asked = {normal(line) for line in required()}
  of = importlib.metadata.packages_distributions()
  providers = {name: {normal(d) for d in of[name]} for path in FILES for name in third_party(path) - OF_EXTRAS}
  assert len(providers) > 15
  assert [name for name, of_name in providers.items() if not of_name & asked] == []
  assert asked - set().union(*providers.values()) == FOR_OTHERS


def test_each_has_its_reason():
  text = (ROOT / "setup.cfg").read_text()
  lines = [line.strip() for line in text.partition("install_requires =\n")[2].partition("\n[")[0].split("\n")]
  named = [normal(line) if line and line[0] != "#" else None for line in lines]
  for i, name in enumerate(named):
    assert name is None or lines[i - 1].startswith("#") or named[i - 1] == name, f"setup.cfg: {lines[i]} has no reason"
