"""GKE through xpk: create a cluster, run an experiment on it, see it, delete it.

  python -m launch.xpk create --cluster=pod --zone=us-east5-a --project=mine --topology=tpu7x:4x4x4 --spot
  python -m launch.xpk run --cluster=pod --zone=us-east5-a --project=mine --topology=tpu7x:4x4x4 \\
    --name=run-1 --workdir=gs://bucket/run -- --config=experiments/kvshift/configs/paper.py:1.5b
  python -m launch.xpk delete --cluster=pod --zone=us-east5-a --project=mine

`run` puts the checked-out commit into an image on top of --image, submits it, and waits.
A workload that exits 75 or loses its nodes is restarted by the cluster itself (JobSet),
and goes on from its workdir; one that ends otherwise is final.

Flags follow xpk v0.14.3 (src/xpk/parser/cluster.py and workload.py). Nothing takes a
secret: --env=NAME has the container take a variable from its own environment, which a
Kubernetes secret fills, and stop with one line if it has none.
"""

from collections.abc import Callable
import shlex
import sys

from launch import command, job, tpu_vm
from launch.command import Failed
from research import run as runs
from research.errors import check

# What xpk's `workload list --wait-for-job-completion` exits with: docs/usage/workloads.md.
_TIMED_OUT, _UNSUCCESSFUL = 124, 125


def main(argv: list[str]) -> int:
  own, rest = job.split(argv)
  args = _parser().parse_args(own)
  job.name("cluster", args.cluster)
  check(
    not rest or args.verb in ("create", "run", "submit"), "command line", "--", f"{args.verb} takes nothing after it"
  )
  verbs = {"create": create, "run": run, "submit": submit, "status": status, "logs": logs, "delete": delete}
  return verbs[args.verb](args, rest)


def create(args, extra: list[str]) -> int:
  """Creates a cluster with slices of a topology; `extra` goes to xpk."""
  kind = tpu_vm.parse_topology(args.topology)[2]
  capacity = ["--spot"] if args.spot else [f"--reservation={args.reservation}"] if args.reservation else ["--on-demand"]
  argv = _xpk(args, "cluster", "create", f"--tpu-type={kind}", f"--num-slices={args.slices}", *capacity, *extra)
  command.retrying(lambda: _call(args, argv), args.retries, args.poll)
  return 0


def submit(args, rest: list[str]) -> int:
  """Submits an experiment, which the cluster then runs to its end, through preemptions."""
  job.name("name", args.name, 40)
  what = job.parse(rest)
  workdir = job.shared_workdir(args.workdir)
  names = job.variables(args.env)
  kind = tpu_vm.parse_topology(args.topology)[2]
  commit = job.commit(what)
  code = job.cache(args.dry_run) / commit[:12]
  if args.dry_run or not code.exists():
    command.call(["git", "clone", "-q", str(job.ROOT), str(code)], dry=args.dry_run)
    command.call(["git", "-C", str(code), "checkout", "-q", commit], dry=args.dry_run)
  options = [
    f"--workload={args.name}",
    f"--tpu-type={kind}",
    f"--num-slices={args.slices}",
    f"--base-docker-image={args.image}",
    f"--script-dir={code}",
    f"--max-restarts={args.retries}",
    f"--restart-on-exit-codes={runs.EXIT_PEERS},{runs.EXIT_INTERRUPTED}",
    "--termination-grace-period-seconds=120",  # to save in, when a node is taken away
    f"--command={_container(what.command(workdir), names)}",
  ]
  argv = _xpk(args, "workload", "create", *options)
  try:
    command.retrying(lambda: _call(args, argv), args.retries, args.poll)
  except Failed as e:
    if e.kind != "exists already":
      raise
    print(f"{args.name} was submitted before", file=sys.stderr)
  return 0


def run(args, rest: list[str]) -> int:
  """Submits an experiment and waits for its end."""
  submit(args, rest)
  done = command.execute(_xpk(args, "workload", "list", f"--wait-for-job-completion={args.name}"), dry=args.dry_run)
  if done.status in (0, _UNSUCCESSFUL):
    if not args.dry_run:
      told = "failed; why is in its log: python -m launch.xpk logs" if done.status else f"done: {args.workdir}"
      print(f"{args.name}: {told}", file=sys.stderr)
    return 1 if done.status else 0
  if done.status == _TIMED_OUT:
    raise Failed("not done yet", "", "the same command goes on waiting", True)
  raise command.failure("xpk", done)


def status(args, rest: list[str]) -> int:
  """Lists the workloads of the cluster, with their states."""
  _call(args, _xpk(args, "workload", "list"))
  return 0


def logs(args, rest: list[str]) -> int:
  """Shows the log of a workload's first worker."""
  # The label that JobSet gives to all its pods; kubectl's context is the one that xpk set.
  pods = [f"--selector=jobset.sigs.k8s.io/jobset-name={args.name},batch.kubernetes.io/job-completion-index=0"]
  more = ["--follow"] if args.follow else []
  timeout = None if args.follow else args.timeout
  command.call(["kubectl", "logs", *pods, "--tail=100", *more], dry=args.dry_run, timeout=timeout)
  return 0


def delete(args, rest: list[str]) -> int:
  """Deletes a workload (--name) or, with all its machines, the cluster, once its name is typed or --yes given."""
  if args.name:
    argv = _xpk(args, "workload", "delete", f"--workload={args.name}", "--force")
  else:
    argv = _xpk(args, "cluster", "delete")
  goes = args.name or args.cluster
  if not args.yes and not args.dry_run:
    print(f"Type {goes} to delete it: ", end="", flush=True)
    typed = sys.stdin.readline().strip()
    check(typed == goes, "name", typed or "''", f"nothing was deleted; type {goes}, or give --yes")
  _call(args, argv)
  return 0


def _parser() -> runs.Parser:
  parser = runs.Parser(prog="python -m launch.xpk", description=__doc__.split("\n")[0])
  verbs = parser.add_subparsers(dest="verb", required=True, metavar="create|run|submit|logs|status|delete")

  def add(verb: str, f: Callable, more: str = "", retries: str | None = None):
    sub = verbs.add_parser(verb, help=f.__doc__, description=f"{f.__doc__} {more}".strip())
    sub.add_argument("--cluster", required=True, help="the cluster's name")
    sub.add_argument("--zone", help="e.g. us-east5-a (gcloud's own default)")
    sub.add_argument("--project", help="Google Cloud project (gcloud's own default)")
    command.add_common(sub, retries)
    return sub

  def add_slices(sub):
    sub.add_argument("--topology", required=True, metavar="GEN:SHAPE", help="of a slice, e.g. v6e:4x4")
    sub.add_argument("--slices", type=int, default=1, metavar="N", help="how many slices (%(default)s)")

  sub = add("create", create, "Arguments after -- go to xpk.", "to ask for capacity again")
  add_slices(sub)
  sub.add_argument("--spot", action="store_true", help="cheaper, and may be preempted at any time")
  sub.add_argument("--reservation", help="capacity that was reserved")
  for verb, f in (("run", run), ("submit", submit)):
    sub = add(verb, f, "The experiment's arguments come after --.", "the cluster restarts it")
    add_slices(sub)
    sub.add_argument("--name", required=True, help="the workload's name")
    sub.add_argument("--workdir", required=True, metavar="DIR", help="gs://... or a path that all workers share")
    sub.add_argument("--image", default="python:3.12", help="base image, with Python 3.11 or 3.12 (%(default)s)")
    sub.add_argument(
      "--env", action="append", default=[], metavar="NAME", help="variable that containers have; no value"
    )
  sub = add("logs", logs)
  sub.add_argument("--name", required=True, help="the workload's name")
  sub.add_argument("--follow", action="store_true", help="go on until Ctrl-C")
  add("status", status)
  sub = add("delete", delete)
  sub.add_argument("--name", help="only this workload")
  sub.add_argument("--yes", action="store_true", help="do not ask for the name")
  return parser


def _xpk(args, group: str, verb: str, *more: str) -> list[str]:
  where = [f"--{name}={value}" for name in ("project", "zone") if (value := getattr(args, name))]
  return ["xpk", group, verb, f"--cluster={args.cluster}", *where, *more, *([] if verb == "list" else ["--quiet"])]


def _call(args, argv: list[str]) -> str:
  return command.call(argv, dry=args.dry_run, timeout=args.timeout)


def _container(run: list[str], names: tuple[str, ...]) -> str:
  """The shell line of a container: the variables it must have, the install, the run in place of the shell."""
  missing = "not in the container; give it by a Kubernetes secret"
  needs = [f'[ -n "${{{name}}}" ] || {{ echo "error: env={name}: {missing}"; exit 2; }};' for name in names]
  # exec: the run itself gets the SIGTERM that announces a preemption.
  return " ".join([*needs, "pip install -q -e '.[tpu]' &&", "exec", shlex.join(run)])


if __name__ == "__main__":
  command.main(lambda: main(sys.argv[1:]))
