"""The commands of launch/README.md are ones that the launchers take."""

import pathlib
import re
import shlex

README = (pathlib.Path(__file__).parents[2] / "launch" / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def test_every_command_prints_what_it_would_run(tools):
  assert len(COMMANDS) >= 13
  for line in COMMANDS:
    python, m, module, *arguments = shlex.split(line)
    assert (python, m) == ("python", "-m")
    at = arguments.index("--") if "--" in arguments else len(arguments)
    done = tools.here(module, *arguments[:at], "--dry-run", *arguments[at:])
    assert done.returncode == 0, (line, done.stderr)
    assert done.stdout, line
  assert tools.calls() == []


def test_every_launcher_is_told(tools):
  folder = pathlib.Path(__file__).parents[2] / "launch"
  for file in folder.glob("*.py"):
    if 'if __name__ == "__main__"' in file.read_text():
      assert f"python -m launch.{file.stem}" in README
