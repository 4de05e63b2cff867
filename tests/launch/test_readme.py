"""The launchers' commands of every page are ones that they take, and launch/README.md tells of every launcher."""

import os
import pathlib
import shlex
import subprocess

import pytest

from tests.commands import LAUNCHES, collect

FOLDER = pathlib.Path(__file__).parents[2] / "launch"
COMMANDS = [c for c in collect() if not c.inline and LAUNCHES.match(c.text)]


@pytest.mark.parametrize("page", sorted({c.page for c in COMMANDS}))
def test_every_command_prints_what_it_would_run(page, tools):
  launches = [c for c in COMMANDS if c.page == page and "python" in c.text]
  assert len(launches) >= 13 or page != "launch/README.md"
  for line in launches:
    _, _, module, *arguments = shlex.split(line.text)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    done = tools.here(module, *arguments[:at], "--dry-run", *arguments[at:])
    assert done.returncode == 0, (str(line), done.stderr)
    assert done.stdout, str(line)
  assert tools.calls() == []


def test_what_is_asked_of_gcloud_reaches_it_word_by_word(tools):
  lines = [c.text for c in COMMANDS if c.text.startswith("gcloud ")]
  tools.scenario([["gcloud"], 0, {}])
  for line in lines:
    subprocess.run(["bash", "-euc", line], env=os.environ | tools.env, check=True)
  assert tools.calls() == [shlex.split(part) for line in lines for part in line.split(" && ")]


def test_every_launcher_is_told():
  readme = (FOLDER / "README.md").read_text()
  for file in FOLDER.glob("*.py"):
    if 'if __name__ == "__main__"' in file.read_text():
      assert f"python -m launch.{file.stem}" in readme
