"""One set of fake tools for all tests of a process: each test has its own scenario."""

import shutil

import pytest

from tests.launch.tools import Tools


@pytest.fixture(scope="session")
def _tools(tmp_path_factory):
  return Tools(tmp_path_factory.mktemp("tools") / "tools")


@pytest.fixture
def tools(_tools):
  """The fakes with nothing made and nothing called."""
  shutil.rmtree(_tools.folder / "worker", ignore_errors=True)
  _tools.scenario()
  return _tools
