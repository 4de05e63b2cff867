"""Seconds from starting `python -m experiments.kvshift` on its :tiny config to the end of its first training step.

python -m benchmarks.cold_start [--out FILE.json]

Cold: an empty REPRISE_CACHE, so every program is compiled. Warm: the same command
again, in a new workdir. Goal: 15 s cold.
"""

import argparse
import os
from pathlib import Path
import re
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import record

GOAL = 15.0  # seconds, cold
RUNS = 3
COMMAND = [sys.executable, "-m", "experiments.kvshift", "--config=experiments/kvshift/configs/main.py:tiny"]
IMPORTS = [sys.executable, "-c", "import experiments.kvshift.__main__"]


def measure(cache: Path, workdir: Path) -> dict[str, float]:
  """One start, in parts.

  start_s: up to the first trace; imports, the config, jax's backend, the corpus.
  compile_s: what jax says that tracing and compiling took. rest_s: the initial values,
  the evaluation before the first step, that step. imports_s: another process, which
  only imports; a part of start_s, less noise.
  """
  env = os.environ | {"REPRISE_CACHE": str(cache), "JAX_LOG_COMPILES": "1"}
  start = time.perf_counter()
  subprocess.run(IMPORTS, env=env, check=True)
  imports = time.perf_counter() - start

  start = time.perf_counter()
  process = subprocess.Popen([*COMMAND, f"--workdir={workdir}"], env=env, stderr=subprocess.PIPE, text=True)
  told, traced, compiled = [], None, 0.0
  try:
    for line in process.stderr:
      now = time.perf_counter() - start
      told.append(line)
      if timed := re.search(r"Finished .* in ([\d.e+-]+) sec", line):
        traced = traced or now
        compiled += float(timed[1])
      if re.search(r"step 0/\d+  loss", line):
        break
    else:
      raise RuntimeError("the run ended before its first step:\n" + "".join(told[-20:]))
  finally:
    process.kill()
    process.wait()
  return {
    "total_s": now,
    "start_s": traced,
    "compile_s": compiled,
    "rest_s": now - traced - compiled,
    "imports_s": imports,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", help="write the rows and the machine as JSON")
  args = parser.parse_args()
  starts = {"cold": [], "warm": []}
  for _ in range(RUNS):
    with tempfile.TemporaryDirectory() as root:
      for name, parts in starts.items():
        parts.append(measure(Path(root, "cache"), Path(root, name)))
  print(f"seconds to the end of the first step, medians of {RUNS}; goal: {GOAL:.0f} cold")
  rows = []
  for name, parts in starts.items():
    row = {part: statistics.median(p[part] for p in parts) for part in parts[0]}
    totals = [p["total_s"] for p in parts]
    print(
      f"{name}: "
      + "  ".join(f"{part[:-2]} {s:.1f}" for part, s in row.items())
      + f"  (totals {min(totals):.1f} to {max(totals):.1f})"
    )
    rows.append(
      {"start": name, **row, "min_s": min(totals), "max_s": max(totals), "goal_s": GOAL if name == "cold" else None}
    )
  if args.out:
    record.write(args.out, "cold_start", rows)


if __name__ == "__main__":
  main()
