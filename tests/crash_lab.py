"""The crash laboratory: runs that are killed, damaged and moved at random must end as if nothing had happened.

python -m tests.crash_lab [--tries=280] [--seed=0] [--config=FILE.py:tiny ...] [--out=FILE.json]

Each try takes a tiny run of one experiment, does one kind of harm to it at a random moment or place, lets the same
command finish it, and compares every logged number and the hash of every array with a run that nobody touched: to the
bit, but for changed meshes and process counts, which sum in another order. Also counted: damage that nobody noticed,
and good checkpoints that are gone. About 10 seconds a try on 2 quiet cores.
"""

import argparse
from collections.abc import Callable
import dataclasses
import functools
import json
import math
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time

from benchmarks import record
from research import config, writers
from research.markdown import table

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = (
  "experiments/kvshift/configs/main.py:tiny",
  "experiments/transnormer/configs/main.py:tiny",
  "experiments/cca/configs/toy.py:tiny",
  "experiments/prefgames/configs/tabular.py:tiny",
)
KEPT = 3  # checkpoints
TIMES = {"step_seconds", "tokens_per_second"}
TOLERANCE = 1e-3  # relative, of losses after a change of mesh or processes


@dataclasses.dataclass
class Lab:
  """A tiny run: how it is started, and what it ends with when nobody touches it."""

  spec: str
  workdir: pathlib.Path  # of the run that nobody touched
  seconds: float = 0.0

  def command(self, workdir: pathlib.Path, *more: str) -> list[str]:
    experiment = pathlib.PurePath(self.spec).parts[1]
    settings = ["steps=12", "seeds=0", "log_every=1", "eval_every=6", "accumulate=1", "tx.warmup=0", f"only={self.arm}"]
    settings += ["checkpoint.every=2", f"checkpoint.keep_last={KEPT}", "batch=8"]
    arguments = [f"--config.{s}" for s in settings]
    command = [sys.executable, "-m", f"experiments.{experiment}", f"--config={self.spec}", f"--workdir={workdir}"]
    return [*command, *arguments, *more]

  @functools.cached_property
  def arm(self) -> str:
    return config.load(str(ROOT / self.spec)).arms[0][0]

  def run(self, workdir: pathlib.Path, *more: str, devices: int = 1, wrapper: tuple[str, ...] = ()) -> subprocess.Popen:
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    command = [*wrapper, *self.command(workdir, *more)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

  def finish(self, workdir: pathlib.Path, *more: str, **how) -> tuple[int, str]:
    process = self.run(workdir, *more, **how)
    _, told = process.communicate(timeout=600)
    return process.returncode, told

  def kill(self, workdir: pathlib.Path, share: float) -> None:
    """Starts the run and sends SIGKILL after a share of the time that all of it takes."""
    process = self.run(workdir)
    try:
      process.wait(timeout=share * self.seconds)
    except subprocess.TimeoutExpired:
      process.kill()
    process.communicate()

  def whole(self) -> None:
    """The run that nobody touches, twice: the second finds its programs compiled, and is timed."""
    for _ in range(2):
      shutil.rmtree(self.workdir, ignore_errors=True)
      began = time.perf_counter()
      status, told = self.finish(self.workdir)
      assert status == 0, told
      self.seconds = time.perf_counter() - began


@dataclasses.dataclass
class Outcome:
  """Of a try. same: it ended as the untouched run. noticed: of damage, else None. lost: good checkpoints gone."""

  same: bool
  noticed: bool | None = None
  lost: int = 0
  note: str = ""


def kill(lab: Lab, workdir: pathlib.Path, rng: random.Random) -> Outcome:
  """SIGKILL at a random moment from the start of the process to a little before its end."""
  lab.kill(workdir, rng.uniform(0.3, 0.95))
  return finished(lab, workdir)


def finished(lab: Lab, workdir: pathlib.Path) -> Outcome:
  """The same command again, to the end."""
  before = steps(workdir)[-1:]
  status, told = lab.finish(workdir)
  after = steps(workdir)
  lost = [s for s in before if s not in after and sum(t > s for t in after) < KEPT]
  return Outcome(status == 0 and equal(lab, workdir), lost=len(lost), note=told)


def flip(lab: Lab, workdir: pathlib.Path, rng: random.Random) -> Outcome:
  """One bit of a random file of the newest checkpoint, larger files more often."""

  def harm(files):
    path = rng.choices(files, [p.stat().st_size for p in files])[0]
    data = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)

  return damage(lab, workdir, harm)


def truncate(lab: Lab, workdir: pathlib.Path, rng: random.Random) -> Outcome:
  """A random file of the newest checkpoint cut at a random place."""

  def harm(files):
    path = rng.choice(files)
    os.truncate(path, rng.randrange(path.stat().st_size))

  return damage(lab, workdir, harm)


def damage(lab: Lab, workdir: pathlib.Path, harm: Callable) -> Outcome:
  """A finished run whose newest checkpoint is damaged, started again.

  Damage is noticed where the run says so and uses the checkpoint before; damage that changes no array (a byte that
  nobody reads) may pass, as what is restored has the right hash: the run is then complete as it stands.
  """
  shutil.copytree(lab.workdir, workdir, dirs_exist_ok=True)
  before = steps(workdir)
  newest = run_dir(workdir) / str(before[-1])
  harm([p for p in newest.rglob("*") if p.is_file() and p.stat().st_size])
  status, told = lab.finish(workdir)
  noticed = f"step {before[-1]} is damaged" in told
  lost = [s for s in before[:-1] if not (run_dir(workdir) / str(s)).is_dir()]
  lost += [] if not noticed or newest.with_name(f"{newest.name}.damaged").exists() else [before[-1]]
  return Outcome(status == 0 and (equal(lab, workdir) if noticed else True), noticed, len(lost), told)


def full_disk(lab: Lab, workdir: pathlib.Path, rng: random.Random) -> Outcome:
  """No file can grow beyond a few hundred blocks; then there is room again."""
  blocks = rng.randrange(2, 40)
  lab.finish(workdir, wrapper=("bash", "-c", f'ulimit -f {blocks}; exec "$@"', "x"))
  return finished(lab, workdir)


def mesh(lab: Lab, workdir: pathlib.Path, rng: random.Random) -> Outcome:
  """Killed, and finished on two devices or four."""
  lab.kill(workdir, rng.uniform(0.5, 0.9))
  status, told = lab.finish(workdir, devices=rng.choice((2, 4)))
  return Outcome(status == 0 and close(lab, workdir), note=told)


def processes(lab: Lab, workdir: pathlib.Path, rng: random.Random) -> Outcome:
  """Killed, and finished by two processes."""
  lab.kill(workdir, rng.uniform(0.5, 0.9))
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  flags = (f"--coordinator=127.0.0.1:{port}", "--processes=2")
  both = [lab.run(workdir, *flags, f"--process={i}") for i in range(2)]
  told = [p.communicate(timeout=600)[1] for p in both]
  return Outcome(all(p.returncode == 0 for p in both) and close(lab, workdir), note="\n".join(told))


KINDS = {"SIGKILL": kill, "bit flipped": flip, "file cut": truncate, "disk full": full_disk}
KINDS |= {"other mesh": mesh, "two processes": processes}
SHARES = (20, 2, 2, 1, 1, 1)  # of the tries


def run_dir(workdir: pathlib.Path) -> pathlib.Path:
  return next(iter((workdir / "checkpoints").glob("*")), workdir / "none")


def steps(workdir: pathlib.Path) -> list[int]:
  return sorted(int(p.name) for p in run_dir(workdir).glob("*") if p.name.isdecimal())


def history(workdir: pathlib.Path) -> list[dict]:
  return [{k: v for k, v in r.items() if k not in TIMES | {"time"}} for r in writers.read(workdir / "metrics.jsonl")]


def arrays(workdir: pathlib.Path) -> dict:
  newest = run_dir(workdir) / str(steps(workdir)[-1])
  return json.loads((newest / "record" / "data.json").read_text())["content"]["arrays"]


def equal(lab: Lab, workdir: pathlib.Path) -> bool:
  return history(workdir) == history(lab.workdir) and arrays(workdir) == arrays(lab.workdir)


def close(lab: Lab, workdir: pathlib.Path) -> bool:
  ours, theirs = history(workdir), history(lab.workdir)
  same = [(r["kind"], r["step"]) for r in ours] == [(r["kind"], r["step"]) for r in theirs]
  losses = [(a["loss"], b["loss"]) for a, b in zip(ours, theirs, strict=False)]
  return same and all(math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-6) for a, b in losses)


def experiment(specs: list[str], tries: int, seed: int, folder: pathlib.Path, kinds: dict[str, int]) -> list[dict]:
  """One row for each experiment and kind of harm: how often tried, and what went wrong."""
  rows = []
  for i, spec in enumerate(specs):
    rng = random.Random(f"{seed} {spec}")
    lab = Lab(spec, folder / f"{i}-whole")
    lab.whole()
    for kind, share in kinds.items():
      row = {"config": spec, "harm": kind, "tries": 0, "differences": 0, "noticed": 0, "harmless": 0, "lost": 0}
      rows.append(row)
      for n in range(max(1, round(tries * share / sum(kinds.values()) / len(specs)))):
        workdir = folder / f"{i}-{kind}-{n}".replace(" ", "_")
        workdir.mkdir()
        outcome = KINDS[kind](lab, workdir, rng)
        row["tries"] += 1
        row["differences"] += not outcome.same
        row["noticed"] += outcome.noticed is True
        row["harmless"] += outcome.noticed is False and outcome.same
        row["lost"] += outcome.lost
        if not outcome.same or outcome.lost:
          print(f"{spec}, {kind}, try {n} of seed {seed}:\n{outcome.note}", file=sys.stderr)
        shutil.rmtree(workdir)
      print(json.dumps(row), flush=True)
  return rows


def summary(rows: list[dict]) -> str:
  """The table of all tries, and one line about them."""
  header = ["config", "harm", "tries", "other results", "noticed", "harmless", "good checkpoints lost"]
  kills = sum(row["tries"] for row in rows if row["harm"] == "SIGKILL")
  counts = f"{sum(row['tries'] for row in rows)} tries, {kills} of them kills alone; {wrong(rows)} went wrong."
  return table(header, [list(row.values()) for row in rows]) + "\n\n" + counts


def wrong(rows: list[dict]) -> int:
  """Runs that ended otherwise, good checkpoints that are gone, damage that was neither told nor harmless."""
  passed = (
    row["tries"] - row["noticed"] - row["harmless"] for row in rows if row["harm"] in ("bit flipped", "file cut")
  )
  return sum(row["differences"] + row["lost"] for row in rows) + sum(passed)


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m tests.crash_lab", description=__doc__.split("\n")[0])
  parser.add_argument("--tries", type=int, default=280)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--config", action="append", metavar="FILE.py:tiny", help="may be repeated (default: one a paper)"
  )
  parser.add_argument("--out", metavar="FILE.json")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    shares = dict(zip(KINDS, SHARES, strict=True))
    rows = experiment(args.config or list(CONFIGS), args.tries, args.seed, pathlib.Path(folder), shares)
  print("\n" + summary(rows))
  if args.out:
    record.write(args.out, "crash_lab", rows)
  sys.exit(1 if wrong(rows) else 0)


if __name__ == "__main__":
  main()
