"""A tool called as from a command line."""

import sys

import pytest


@pytest.fixture
def command(monkeypatch, capsys):
  """(module, arguments) -> (exit status, what it printed, what it complains of)."""

  def run(module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    capsys.readouterr()
    try:
      module.main()
    except SystemExit as e:
      return e.code, *capsys.readouterr()
    return 0, *capsys.readouterr()

  return run
