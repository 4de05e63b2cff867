"""Benchmark records: numbers beside everything needed to judge or repeat them."""

import datetime
from importlib.metadata import version
import json
from pathlib import Path
import platform
import shlex
import subprocess
import sys


def write(path: str | Path, name: str, rows: list[dict]) -> None:
  """Writes the measured `rows` of benchmark `name`, and the machine they come from, as JSON.

  A benchmark of an accelerator names it in its rows: asking jax here would start a
  backend, and on a TPU machine seize it, for benchmarks that need none.
  """
  from research import manifest  # imports jax, which some benchmarks set up before they do

  record = {
    "name": name,
    "command": shlex.join(["python", *sys.orig_argv[1:]]),
    "commit": _commit(),
    "date": datetime.date.today().isoformat(),
    "python": platform.python_version(),
    "jax": version("jax"),
    **manifest.cpu(),
    "rows": rows,
  }
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  Path(path).write_text(json.dumps(record, indent=2) + "\n")


def _commit() -> str:
  """The commit of this checkout, with "-dirty" behind it if files differ from it."""
  command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
  try:
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
