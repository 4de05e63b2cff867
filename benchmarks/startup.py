"""How long one waits: for imports, and for the first training step of `python -m experiments.kvshift` on :tiny.

python -m benchmarks.startup [--out FILE.json]

Imports are measured one after the other in a process: `import research` beyond `import jax`, what starts a run beyond
that. Cold: an empty REPRISE_CACHE, so every program is compiled. Warm: the same command again, in a new workdir.
Processor time, of all threads, is what other programs on the machine do not lengthen.
Goals: 1 s for `import research`, 15 s for a cold start.
"""

import argparse
import json
import os
from pathlib import Path
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import record

GOALS = {"research": 1.0, "cold": 15.0}  # seconds
RUNS = 3
COMMAND = [sys.executable, "-m", "experiments.kvshift", "--config=experiments/kvshift/configs/main.py:tiny"]
MODULES = ("jax", "research", "research.run", "experiments.kvshift.__main__")
IMPORTS = f"""
import importlib, json, time
took = {{}}
for name in {MODULES}:
  start = time.perf_counter(), time.process_time()
  importlib.import_module(name)
  took[name] = time.perf_counter() - start[0], time.process_time() - start[1]
print(json.dumps(took))
"""


def imports() -> dict[str, tuple[float, float]]:
  """Seconds of each of `MODULES`, beyond those before it: by the wall clock, and of the processor."""
  return json.loads(subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True).stdout)


def first_step(cache: Path, workdir: Path) -> dict[str, float]:
  """One start, in parts.

  start_s: up to the first trace; imports, the config, jax's backend, the corpus.
  compile_s: what jax says that tracing and compiling took. rest_s: the initial values,
  the evaluation before the first step, that step. processor_s: of all threads.
  """
  used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
  before = used()
  env = os.environ | {"REPRISE_CACHE": str(cache), "JAX_LOG_COMPILES": "1"}
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
  parts = {"start_s": traced, "compile_s": compiled, "rest_s": now - traced - compiled}
  return {"total_s": now, **parts, "processor_s": used() - before}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", help="write the rows and the machine as JSON")
  args = parser.parse_args()
  imported = [imports() for _ in range(RUNS)]
  starts = {"cold": [], "warm": []}
  for _ in range(RUNS):
    with tempfile.TemporaryDirectory() as root:
      for name, parts in starts.items():
        parts.append(first_step(Path(root, "cache"), Path(root, name)))
  rows = []
  print(f"seconds, medians of {RUNS}; goals: {GOALS['research']:g} for research, {GOALS['cold']:g} cold")
  for name in MODULES:
    took, processor = zip(*(of[name] for of in imported), strict=True)
    total, used = statistics.median(took), statistics.median(processor)
    rows.append({"import": name, "total_s": total, "processor_s": used, "min_s": min(took), "max_s": max(took)})
    print(f"import {name}: {total:.2f}  processor {used:.2f}  (totals {min(took):.2f} to {max(took):.2f})")
  for name, parts in starts.items():
    row = {part: statistics.median(p[part] for p in parts) for part in parts[0]}
    totals = [p["total_s"] for p in parts]
    rows.append({"start": name, **row, "min_s": min(totals), "max_s": max(totals)})
    told = "  ".join(f"{part[:-2]} {s:.1f}" for part, s in row.items())
    print(f"{name}: {told}  (totals {min(totals):.1f} to {max(totals):.1f})")
  for row in rows:
    row["goal_s"] = GOALS.get(row.get("import", row.get("start")))
  if args.out:
    record.write(args.out, "startup", rows)


if __name__ == "__main__":
  main()
