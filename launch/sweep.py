"""A grid over a config's fields: every combination in a workdir of its own, here or through a launcher.

  python -m launch.sweep --config=FILE.py:ARG --grid tx.lr=1e-3,1e-2 --grid seeds=0,1 --workdir=ROOT
  python -m launch.sweep --config=FILE.py:ARG --grid tx.lr=1e-3,1e-2 --workdir=/shared/ROOT \\
    --on=slurm -- --nodes=1 --gpus-per-node=8

The same command goes on: a run that is complete says so and ends at once. Here
(--on=local) and on a TPU VM the runs come one after another, and one that exits 75 is
run again; to Slurm and GKE they are submitted, and requeued there. A table of how each
ended comes last; the exit status is 0 if all did well, else that of the first that did not.
"""

import importlib
import itertools
import pathlib
import re
import shlex
import subprocess
import sys
import zlib

from launch import command, job
from research import report
from research import run as runs
from research.errors import check

_VERBS = {"slurm": "submit", "tpu_vm": "run", "xpk": "submit"}


def main(argv: list[str]) -> int:
  own, rest = job.split(argv)
  args, overrides = _parser().parse_with_overrides(own)
  check(not rest or args.on != "local", "command line", "--", "what follows goes to a launcher; choose one by --on")
  points = grid(args.grid)
  what = job.parse([f"--config={args.config}", *(f"--config.{item}" for item in overrides)])
  jobs = {}
  for point in points:  # all of them now: a mistake is told before anything runs
    with_point = [f"--config.{item}" for item in (*overrides, *point)]
    jobs[directory(point)] = job.parse([f"--config={args.config}", *with_point])
  root = args.workdir or f"{runs.default_workdir(what.experiment, args.config)}-sweep"
  root = root.rstrip("/") if "://" in root else str(pathlib.Path(root).resolve())
  return run(args, rest, root, jobs)


def grid(items: list[str]) -> list[tuple[str, ...]]:
  """The product of `["a.b=1,2", "c=3"]`: [("a.b=1", "c=3"), ("a.b=2", "c=3")]. Raises UserError."""
  axes = []
  for item in items:
    name, _, values = item.partition("=")
    check(bool(name and values), "grid", item or "''", "write NAME=VALUE,VALUE, e.g. tx.lr=1e-3,1e-2")
    each = values.split(",")
    check(all(each) and len(set(each)) == len(each), "grid", item, "each value once, none empty")
    axes.append([f"{name}={value}" for value in each])
  names = [item.partition("=")[0] for item in items]
  check(len(set(names)) == len(names), "grid", ", ".join(names), "each field once, with all its values")
  return list(itertools.product(*axes))


def directory(point: tuple[str, ...]) -> str:
  """A name for a combination that can be read: "tx.lr=1e-3,seeds=0", with _ for what has no place in a path."""
  return ",".join(re.sub(r"[^\w.=+-]", "_", item) for item in point)


def run(args, rest: list[str], root: str, jobs: dict[str, job.Job]) -> int:
  """Runs or submits every job in its workdir, then tells how each ended."""
  width = len(str(len(jobs)))
  ended: dict[str, int] = {}
  try:
    for number, (name, what) in enumerate(jobs.items()):
      workdir = f"{root}/{name}"
      print(f"[{number + 1:{width}}/{len(jobs)}] {workdir}", flush=True)
      if args.on == "local":
        ended[name] = _until_final(args, what.command(workdir, sys.executable))
      else:
        ended[name] = _launch(args, rest, workdir, what)
  except KeyboardInterrupt:
    print("\nstopped; the same command goes on", file=sys.stderr)
  finally:
    if not args.dry_run:
      rows = [(name, ended.get(name, "-"), _told(args, ended.get(name)), f"{root}/{name}") for name in jobs]
      print("\n" + report.table(("run", "status", "meaning", "workdir"), rows))
  if len(ended) < len(jobs):
    return runs.EXIT_INTERRUPTED
  return next((status for status in ended.values() if status), 0)


def _parser() -> runs.Parser:
  parser = runs.Parser(
    prog="python -m launch.sweep",
    description=f"{__doc__.split(chr(10))[0]} Fields set by --config.NAME=VALUE hold for all.",
  )
  parser.add_argument("--config", required=True, metavar="FILE.py:ARG", help="a config file")
  parser.add_argument(
    "--grid", action="append", required=True, metavar="NAME=V,V", help="a field and its values; may be repeated"
  )
  parser.add_argument("--on", choices=("local", *_VERBS), default="local", help="where (%(default)s)")
  parser.add_argument("--workdir", metavar="ROOT", help="has a directory for each (default: under runs/)")
  command.add_common(parser, "to run again what exits 75")
  return parser


def _until_final(args, argv: list[str]) -> int:
  """Runs it here until it ends for good, `retries` times more at most."""
  attempt = 0
  while True:
    print(("" if args.dry_run else "$ ") + shlex.join(argv), flush=True)
    status = 0 if args.dry_run else _here(argv)
    if status not in command.AGAIN or attempt == args.retries:
      return status
    attempt += 1
    command.wait(command.meaning(status), attempt, args.retries, args.poll)


def _here(argv: list[str]) -> int:
  """The exit status of a command that shares this terminal, so that Ctrl-C reaches it too: it saves, then we stop."""
  process = subprocess.Popen(argv, cwd=job.ROOT)
  try:
    return process.wait()
  except KeyboardInterrupt:
    process.wait()
    raise


def _launch(args, rest: list[str], workdir: str, what: job.Job) -> int:
  settings = [f"--config={what.spec}", *(f"--config.{item}" for item in what.overrides)]
  dry = ["--dry-run"] if args.dry_run else []
  # A workload of GKE needs a name of its own, and the same one when the same command goes on.
  root, point = workdir.rsplit("/", 2)[-2:]
  short = re.sub("[^a-z0-9]+", "-", root.lower())[:20].strip("-")
  name = [f"--name=sweep-{short}-{zlib.crc32(point.encode()):08x}"] if args.on == "xpk" else []
  argv = [f"--workdir={workdir}", *name, *dry, *rest]
  launcher = importlib.import_module(f"launch.{args.on}")
  return command.outcome(lambda: launcher.main([_VERBS[args.on], *argv, "--", *settings]))


def _told(args, status: int | None) -> str:
  if status is None:
    return "not run"
  return "submitted" if status == 0 and args.on in ("slurm", "xpk") else command.meaning(status)


if __name__ == "__main__":
  command.main(lambda: main(sys.argv[1:]))
