"""Slurm: submit an experiment to a GPU cluster as a job that is requeued until it is done, see it, cancel it.

  python -m launch.slurm submit --nodes=2 --gpus-per-node=8 --time=24:00:00 --partition=gpu \\
    --workdir=/shared/run -- --config=experiments/kvshift/configs/paper.py:1.5b

`submit` writes a batch script and a copy of the checked-out commit beside the workdir's
other files (for a bucket: under runs/slurm/), and gives it to sbatch. 120 s before the
time limit, and when Slurm preempts it, the run is told to save (SIGTERM) and exits 75;
the script then has the job requeued, and it goes on from its workdir. jax finds the
processes of the job by itself.

Flags follow the manual pages of Slurm 24.05: sbatch, srun, squeue, scancel, scontrol. Of
the environment, a job gets HOME, PATH, USER, LD_LIBRARY_PATH and what --env names.
"""

from collections.abc import Callable
import pathlib
import re
import shlex
import sys

from launch import command, job
from research import run as runs
from research.errors import check

_SCRIPT = """\
#!/bin/bash
{directives}
cd {code} || exit 1
# Of a GPU's memory jax takes 75 % by itself; launch.plan counts on this.
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
# One task that fails ends the others after a minute: long enough for all to save.
srun --wait=60 --export=ALL {run}
status=$?
# A job that was cancelled, or that Slurm requeues itself, is no longer running.
if [ $status -eq 75 -o $status -eq 69 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {retries} ] &&
    [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
"""
_PASSED = ("HOME", "PATH", "USER", "LD_LIBRARY_PATH")


def main(argv: list[str]) -> int:
  own, rest = job.split(argv)
  args = _parser().parse_args(own)
  check(not rest or args.verb == "submit", "command line", "--", f"{args.verb} takes nothing after it")
  return {"submit": submit, "status": status, "cancel": cancel}[args.verb](args, rest)


def submit(args, rest: list[str]) -> int:
  """Submits an experiment; the job's script, code and log are told."""
  what = job.parse(rest)
  bucket = "://" in args.workdir
  fix = "name a directory that all nodes share, or a bucket, without blanks"
  check(bool(args.workdir) and not re.search(r"\s", args.workdir), "workdir", args.workdir or "''", fix)
  workdir = args.workdir if bucket else str(pathlib.Path(args.workdir).resolve())
  label = args.name or re.sub(r"[^\w.-]", "-", pathlib.PurePath(workdir).name) or "reprise"
  names = job.variables(args.env)
  check(bool(re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", args.time)), "time", args.time, "use HH:MM:SS or DAYS-HH:MM:SS")
  commit = job.commit(what)
  here = pathlib.Path("runs", "slurm", label).resolve() if bucket else pathlib.Path(workdir)
  script, code = here / "job.sh", here / f"code-{commit[:12]}"
  text = _script(args, label, here, code, what.command(workdir, sys.executable))
  if args.dry_run:
    print(f"# {script}:")
    print("".join(f"# {line}\n" for line in text.splitlines()), end="")
  else:
    here.mkdir(parents=True, exist_ok=True)
    script.write_text(text)
  if args.dry_run or not code.exists():
    clone = ["git", "-c", "advice.detachedHead=false", "clone", "-q", str(job.ROOT), str(code)]
    command.call(clone, dry=args.dry_run)
    command.call(["git", "-C", str(code), "checkout", "-q", commit], dry=args.dry_run)
  # Names only: Slurm takes the values from here, and no other variable goes along.
  argv = ["sbatch", "--parsable", f"--export={','.join((*_PASSED, *names))}", str(script)]
  # Not tried again: what timed out may have been submitted.
  told = command.call(argv, dry=args.dry_run, timeout=args.timeout)
  if not args.dry_run:
    number = told.strip().partition(";")[0]
    print(f"job {number}; log: {here}/slurm-{number}.log; python -m launch.slurm status --job={number}")
  return 0


def status(args, rest: list[str]) -> int:
  """Shows the state of a job, or of all jobs of yours."""
  only = [f"--jobs={args.job}"] if args.job else ["--me"]
  command.call(["squeue", *only, "--long"], dry=args.dry_run, timeout=args.timeout)
  return 0


def cancel(args, rest: list[str]) -> int:
  """Cancels a job for good; what it saved stays."""
  command.call(["scancel", args.job], dry=args.dry_run, timeout=args.timeout)
  return 0


def _parser() -> runs.Parser:
  parser = runs.Parser(prog="python -m launch.slurm", description=__doc__.split("\n")[0])
  verbs = parser.add_subparsers(dest="verb", required=True, metavar="submit|status|cancel")

  def add(verb: str, f: Callable, more: str = ""):
    sub = verbs.add_parser(verb, help=f.__doc__, description=f"{f.__doc__} {more}".strip())
    command.add_common(sub)
    return sub

  sub = add("submit", submit, "Its arguments come after --.")
  command.add_retries(sub, "the job is requeued")
  sub.add_argument("--workdir", required=True, metavar="DIR", help="a directory that all nodes share, or gs://...")
  sub.add_argument("--nodes", type=_positive, default=1, metavar="N", help="how many nodes (%(default)s)")
  sub.add_argument("--gpus-per-node", type=_positive, default=8, metavar="N", help="(%(default)s)")
  sub.add_argument(
    "--tasks", choices=("gpu", "node"), default="gpu", help="one process per gpu or per node (%(default)s)"
  )
  sub.add_argument("--time", default="24:00:00", help="limit of one go, HH:MM:SS (%(default)s)")
  sub.add_argument("--partition", help="which partition (the cluster's default)")
  sub.add_argument("--account", help="which account (your default)")
  sub.add_argument("--name", help="the job's name (the last part of the workdir)")
  sub.add_argument("--env", action="append", default=[], metavar="NAME", help="variable to pass on; a name, no value")
  add("status", status).add_argument("--job", help="a job's number")
  add("cancel", cancel).add_argument("--job", required=True, help="the job's number")
  return parser


def _positive(text: str) -> int:
  value = command.count(text)
  if value < 1:
    raise ValueError
  return value


def _script(args, label: str, here: pathlib.Path, code: pathlib.Path, run: list[str]) -> str:
  gpus = args.gpus_per_node
  options = {
    "job-name": label,
    "nodes": args.nodes,
    "ntasks-per-node": gpus if args.tasks == "gpu" else 1,
    "gpus-per-node": gpus,
    "time": args.time,
    "partition": args.partition,
    "account": args.account,
    "output": f"{here}/slurm-%j.log",
    "open-mode": "append",
    "signal": "TERM@120",
  }
  directives = [f"#SBATCH --{name}={value}" for name, value in options.items() if value] + ["#SBATCH --requeue"]
  if args.tasks == "node":
    # On Slurm jax takes one GPU per process, unless told which.
    directives += ["", f"export JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(gpus)))}"]
  return _SCRIPT.format(
    directives="\n".join(directives), code=shlex.quote(str(code)), run=shlex.join(run), retries=args.retries
  )


if __name__ == "__main__":
  command.main(lambda: main(sys.argv[1:]))
