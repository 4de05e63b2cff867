"""Runs of several processes on this machine, for the tests of them."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

from research import writers

ROOT = pathlib.Path(__file__).parents[1]
HEARTBEAT, START = 6, 60  # seconds, for the tests; the constants of `distributed` are for clusters
ENDS = HEARTBEAT + 15  # seconds in which the others must have ended, on a busy machine too

# The command, with shorter waits; and with the rows told that each step took, for the tests that ask.
DRIVER = """
import os, runpy, sys
from research import distributed, fit
distributed.HEARTBEAT_SECONDS, distributed.START_SECONDS = int(os.environ["HEARTBEAT"]), int(os.environ["START"])
if os.environ.get("ROWS"):
  import jax, numpy
  taken, place = [], fit.to_devices
  def to_devices(batch):
    taken.append(batch["tokens"])
    numpy.save(f"{os.environ['ROWS']}-{jax.process_index()}.npy", numpy.stack(taken))
    return place(batch)
  fit.to_devices = to_devices
sys.argv[0] = "experiments.kvshift"
runpy.run_module("experiments.kvshift", run_name="__main__")
"""
SETTINGS = [
  "--config=experiments/kvshift/configs/main.py:tiny",
  "--config.only=kvshift",
  "--config.seeds=0",
  "--config.accumulate=1",
  "--config.log_every=1",
  "--config.checkpoint.keep_last=3",
]
RUN = pathlib.Path("checkpoints", "kvshift-0")
TIMES = {"step_seconds", "tokens_per_second"}


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


class Launch:
  """`processes` of one run; they are gone when the `with` block ends."""

  def __init__(self, processes, devices, logs, *arguments, environment=None, flags=None, driver=DRIVER):
    port = free_port()
    flags = flags or (lambda i: [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process={i}"])
    environment = environment or (lambda i: {})
    self.logs = [logs / f"{time.time_ns()}-{i}.log" for i in range(processes)]
    self.processes = []
    for i, log in enumerate(self.logs):
      env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "HEARTBEAT": str(HEARTBEAT), "START": str(START)}
      command = [sys.executable, "-c", driver, *SETTINGS, *arguments, *(flags(i) if processes > 1 else [])]
      with log.open("w") as out:
        self.processes.append(
          subprocess.Popen(command, env=env | environment(i), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        )

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    for process in self.processes:
      process.kill()
      process.wait()

  def end(self, within=240):
    """Exit statuses, in the order of the processes."""
    until = time.monotonic() + within
    for process in self.processes:
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(until - time.monotonic(), 0.01))
    codes = [process.poll() for process in self.processes]
    assert None not in codes, self.told()
    return codes

  def told(self, i=None):
    if i is not None:
      return "".join(line for line in self.logs[i].open() if "[Gloo]" not in line)
    return "\n".join(f"--- process {i}\n{self.told(i)}" for i in range(len(self.logs)))

  def last(self, i):
    return self.told(i).splitlines()[-1]


def go(processes, devices, workdir, *arguments, **kwargs):
  with Launch(processes, devices, workdir.parent, f"--workdir={workdir}", *arguments, **kwargs) as launch:
    assert launch.end() == [0] * processes, launch.told()
    return launch


def history(workdir):
  return [{k: v for k, v in r.items() if k not in TIMES} for r in writers.read(workdir / "metrics.jsonl")]


def losses(workdir):
  return [r["loss"] for r in history(workdir)]


def steps(workdir):
  return sorted(int(p.name) for p in (workdir / RUN).glob("*") if p.name.isdecimal())


def hashes(workdir, step=None):
  """The hash of every array at `step` (default: the newest)."""
  step = steps(workdir)[-1] if step is None else step
  return json.loads((workdir / RUN / str(step) / "record" / "data.json").read_text())["content"]["arrays"]


def logged(workdir):
  path = workdir / "metrics.jsonl"
  return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(launch, ready):
  until = time.monotonic() + 120
  while not ready():
    assert all(p.poll() is None for p in launch.processes), launch.told()
    assert time.monotonic() < until, launch.told()
    time.sleep(0.01)
