"""TPU VMs: create a pod, run an experiment on all its workers, see it, delete it.

  python -m launch.tpu_vm run --name=pod --zone=us-west4-a --topology=v5e:4x4 --spot --queued \\
    --workdir=gs://bucket/run -- --config=experiments/kvshift/configs/paper.py:1.5b
  python -m launch.tpu_vm delete --name=pod --zone=us-west4-a

`run` makes the pod if there is none and --topology is given, copies the checked-out
commit, installs it, and starts the experiment on all workers. If the pod is preempted it
is requested again, and the run goes on from its workdir; so it does after it exits with
75, or with 69, one of its processes being gone. A lost connection does not end a run: it
is watched again, by the same command too.

Flags follow Google Cloud SDK 528: compute tpus tpu-vm and compute tpus queued-resources.
No flag takes a secret: gcloud has its own sign-in, and --env=NAME has the workers take a
variable from their environment or the secret manager.
"""

from collections.abc import Callable
import re
import shlex
import sys
import time
from typing import NamedTuple

from launch import command, job, topology
from launch.command import Failed
from research import run as runs
from research.errors import UserError, check


class Generation(NamedTuple):
  """How gcloud names a TPU generation. cores: what the number in v5p-16 counts per chip."""

  type: str
  cores: int
  runtime: str


# Names, sizes and runtimes: cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e and runtimes.
GENERATIONS = {
  "v4": Generation("v4", 2, "tpu-ubuntu2204-base"),
  "v5e": Generation("v5litepod", 1, "v2-alpha-tpuv5-lite"),
  "v5p": Generation("v5p", 2, "v2-alpha-tpuv5"),
  "v6e": Generation("v6e", 1, "v2-alpha-tpuv6e"),
  "tpu7x": Generation("tpu7x", 2, ""),  # the Cloud TPU API does not have it: GKE only
}
BLOCKS = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4")  # below 4x4x4; above, multiples of 4 in rising order

# ssh itself notices a worker that went away; gcloud would wait for ever.
_SSH = ("--ssh-flag=-oConnectTimeout=30", "--ssh-flag=-oServerAliveInterval=30", "--ssh-flag=-oServerAliveCountMax=4")
_ENDED = re.compile(r"^reprise: (\S+) ended with (\d+)$", re.MULTILINE)

SILENT = "a worker does not answer"
READY, ABSENT, LOST, FAILED, PENDING = "ready", "absent", "lost", "failed", "pending"


def parse_topology(text: str) -> tuple[Generation, topology.Topology, str]:
  """What gcloud and xpk call a topology: of "v5e:4x4" the last is "v5litepod-16". Raises UserError."""
  known = ", ".join(GENERATIONS)
  check(text.partition(":")[0] in GENERATIONS, "topology", text or "''", f"choose from {known}, as in v5e:4x4")
  slice_ = topology.parse(text)
  if slice_.chip.torus == 3:
    whole = list(slice_.dims) == sorted(slice_.dims) and all(side % 4 == 0 for side in slice_.dims)
    fix = f"choose from {', '.join(BLOCKS)}, or multiples of 4 in rising order, as in 4x4x8"
    check(whole or slice_.size in BLOCKS, "topology", text, fix)
  generation = GENERATIONS[slice_.generation]
  return generation, slice_, f"{generation.type}-{slice_.chips * generation.cores}"


def main(argv: list[str]) -> int:
  own, rest = job.split(argv)
  args = _parser().parse_args(own)
  job.name("name", args.name)
  check(bool(re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", args.zone)), "zone", args.zone, "name a zone, e.g. us-west4-a")
  check(not rest or args.verb in ("create", "run"), "command line", "--", f"{args.verb} takes nothing after it")
  return {"create": create, "run": run, "logs": logs, "status": status, "stop": stop, "delete": delete}[args.verb](
    args, rest
  )


def create(args, extra: list[str]) -> int:
  """Requests the pod and waits until it is ready; `extra` goes to gcloud."""
  argv = _create_argv(args, extra)
  command.retrying(lambda: _call(args, argv), args.retries, args.poll)
  _wait_until_ready(args)
  return 0


def run(args, rest: list[str]) -> int:
  """Runs an experiment to its end, through preemptions; the run's own exit status."""
  what = job.parse(rest)
  workdir = job.shared_workdir(args.workdir)
  names = job.variables(args.env)
  if args.topology:
    _create_argv(args, [])  # a mistake in it is told now, not after the first preemption
  commit = job.commit(what)
  code = f"reprise/{commit[:12]}"
  script = ["bash", f"{code}/launch/worker.sh"]
  tail = [*names, "--", *what.command(workdir)[1:]]
  session, attempt, verb, copied = int(time.time()), 0, "start", False
  token = f"{session}-0"
  while True:
    began = time.monotonic()
    try:
      if _make_ready(args):
        verb, copied = "again", False
      if not copied:
        copy(args, commit, code)
        copied = True
      ended, why = _follow(args, shlex.join([*script, verb, args.name, token, *tail]))
      if ended is not None:
        if not args.dry_run:
          print(f"{args.name}: {command.meaning(ended)}: {workdir}", file=sys.stderr)
        return ended
      if why != SILENT:  # what fell silent may have gone on: then there is nothing to start
        verb, token = "again", f"{session}-{attempt + 1}"
    except Failed as e:
      if not e.again or attempt >= args.retries:
        raise
      why = str(e)
    if attempt >= args.retries:
      raise Failed(why, f"gave up after {attempt} more attempts", "the same command goes on", True)
    # Pauses grow while attempts fail at once, and start over after one that got somewhere.
    attempt += 1
    command.wait(why, attempt, args.retries, args.poll, grow=time.monotonic() - began < 600)


def logs(args, rest: list[str]) -> int:
  """Shows the end of a worker's log, or of all."""
  more = ["-F"] if args.follow else []
  remote = shlex.join(["tail", "-n", str(args.lines), *more, f"reprise-runs/{args.name}/log"])
  timeout = None if args.follow else args.timeout
  command.call(ssh(args, remote, args.worker), dry=args.dry_run, timeout=timeout)
  return 0


def status(args, rest: list[str]) -> int:
  """Tells the state of the pod and, of one that is ready, how the run on each worker stands."""
  state, told = _look(args)
  print(f"{args.name}: {state}{f' ({told})' if told else ''}")
  if state == READY:
    here = f"reprise-runs/{args.name}"
    remote = (
      f'echo "$(hostname): $(if ! [ -e {here}/log ]; then echo no run yet; elif ! flock -ns {here}/lock true; then '
      f'echo running; else echo ended with $(cat {here}/status); fi; tail -n 1 {here}/log 2>/dev/null)"'
    )
    command.call(ssh(args, remote), dry=args.dry_run, timeout=args.timeout)
  return 0


def stop(args, rest: list[str]) -> int:
  """Has the run on all workers save and end; the pod stays."""
  # of several commits any will do: the script finds the run by its name
  remote = f'cd "$(ls -dt reprise/*/ | head -n 1)" && bash launch/worker.sh stop {args.name}'
  command.call(ssh(args, remote), dry=args.dry_run, timeout=args.timeout)
  return 0


def delete(args, rest: list[str]) -> int:
  """Deletes the pod and its request, once the name is typed or --yes given."""
  if args.dry_run:
    print("# if it was queued:")
    command.execute(gcloud(args, "queued-resources", "delete", "--force"), dry=True)
    print("# else:")
    command.execute(gcloud(args, "tpu-vm", "delete"), dry=True)
    return 0
  state, told = _look(args)
  if state == ABSENT:
    print(f"{args.name}: there is no such pod in {args.zone}")
    return 0
  if not args.yes:
    print(f"{args.name} in {args.zone} is {state} ({told}). Type its name to delete it: ", end="", flush=True)
    typed = sys.stdin.readline().strip()
    check(typed == args.name, "name", typed or "''", f"nothing was deleted; type {args.name}, or give --yes")
  _delete(args)
  return 0


def _parser() -> runs.Parser:
  parser = runs.Parser(prog="python -m launch.tpu_vm", description=__doc__.split("\n")[0])
  verbs = parser.add_subparsers(dest="verb", required=True, metavar="create|run|logs|status|stop|delete")

  def add(verb: str, f: Callable, more: str = "", retries: str | None = None):
    sub = verbs.add_parser(verb, help=f.__doc__, description=f"{f.__doc__} {more}".strip())
    sub.add_argument("--name", required=True, help="the pod's name")
    sub.add_argument("--zone", required=True, help="where it is, e.g. us-west4-a")
    sub.add_argument("--project", help="Google Cloud project (gcloud's own default)")
    command.add_common(sub, retries)
    return sub

  def add_pod(sub, required: bool):
    sub.add_argument("--topology", required=required, metavar="GEN:SHAPE", help="the pod to make, e.g. v5e:4x4")
    sub.add_argument("--spot", action="store_true", help="cheaper, and may be preempted at any time")
    sub.add_argument("--queued", action="store_true", help="wait in the queue for capacity (queued resource)")
    sub.add_argument("--runtime", help="runtime version (that of the generation)")

  add_pod(add("create", create, "Arguments after -- go to gcloud.", "to ask for capacity again"), True)
  sub = add("run", run, "The experiment's arguments come after --.", "to go on after preemption, exit 75 or silence")
  add_pod(sub, False)
  sub.add_argument("--workdir", required=True, metavar="DIR", help="gs://... or a path that all workers share")
  sub.add_argument("--env", action="append", default=[], metavar="NAME", help="variable that workers have; no value")
  sub = add("logs", logs)
  sub.add_argument("--worker", default="0", metavar="N", help="which worker, or all (%(default)s)")
  sub.add_argument("--lines", type=command.count, default=100, metavar="N", help="how many lines (%(default)s)")
  sub.add_argument("--follow", action="store_true", help="go on until Ctrl-C")
  add("status", status)
  add("stop", stop)
  add("delete", delete).add_argument("--yes", action="store_true", help="do not ask for the name")
  return parser


def gcloud(args, group: str, verb: str, *more: str) -> list[str]:
  """A command line of gcloud about the pod of `args` (name, zone, project)."""
  project = [f"--project={args.project}"] if args.project else []
  return ["gcloud", "compute", "tpus", group, verb, args.name, f"--zone={args.zone}", *project, *more, "--quiet"]


def ssh(args, remote: str, worker: str = "all") -> list[str]:
  """The command line that runs the shell line `remote` on a worker, or on all."""
  return gcloud(args, "tpu-vm", "ssh", f"--worker={worker}", *_SSH, f"--command={remote}")


def _call(args, argv: list[str], **options) -> str:
  return command.call(argv, dry=args.dry_run, timeout=args.timeout, **options)


def _create_argv(args, extra: list[str]) -> list[str]:
  generation, slice_, accelerator = parse_topology(args.topology)
  runtime = args.runtime or generation.runtime
  check(bool(runtime), "topology", args.topology, "TPU VMs do not have this generation; use python -m launch.xpk")
  # Up to 128 chips, how many there are says their shape. Beyond, --type and --topology
  # do; for v5p only the alpha commands take them.
  kind, alpha = [f"--accelerator-type={accelerator}"], False
  if slice_.chip.torus == 3 and slice_.chips > 128:
    kind, alpha = [f"--type={generation.type}", f"--topology={slice_.size}"], generation.type != "v4"
  spot = ["--spot"] if args.spot else []
  if args.queued:
    node = [f"--node-id={args.name}", f"--runtime-version={runtime}"]
    argv = gcloud(args, "queued-resources", "create", *node, *kind, *spot, *extra)
  else:
    argv = gcloud(args, "tpu-vm", "create", f"--version={runtime}", *kind, *spot, *extra)
  return ["gcloud", "alpha", *argv[1:]] if alpha else argv


def _look(args) -> tuple[str, str]:
  """(one of the five states, gcloud's own words for it)."""
  if args.dry_run:
    for group, value in (("queued-resources", "state.state"), ("tpu-vm", "state")):
      command.execute(gcloud(args, group, "describe", f"--format=value({value})"), dry=True)
    return READY, "as if it were"
  queued = _describe(args, "queued-resources", "state.state")
  node = _describe(args, "tpu-vm", "state")
  told = ", ".join(filter(None, (queued and f"request {queued}", node and f"node {node}")))
  if not queued and not node:
    return ABSENT, ""
  if queued == "FAILED":
    return FAILED, told
  if queued in ("SUSPENDING", "SUSPENDED") or node in ("PREEMPTED", "TERMINATED"):
    return LOST, told
  return (READY if node == "READY" and queued in ("", "ACTIVE") else PENDING), told


def _describe(args, group: str, value: str) -> str:
  argv = gcloud(args, group, "describe", f"--format=value({value})")

  def ask():
    try:
      return command.call(argv, timeout=args.timeout, echo=False).strip()
    except Failed as e:
      if e.kind == "not found":
        return ""
      raise

  return command.retrying(ask, 3, getattr(args, "poll", 5.0))


def _make_ready(args) -> bool:
  """Has the pod ready, waiting for it or making it (anew) if --topology says what; whether it was made."""
  state, told = _look(args)
  if args.dry_run and args.topology:
    print("# if there is no such pod, or it was preempted (then deleted first):")
    command.execute(_create_argv(args, []), dry=True)
  if state == READY:
    return False
  if state == PENDING:
    _wait_until_ready(args)
    return True
  what = {ABSENT: "there is no such pod", LOST: f"the pod was preempted: {told}", FAILED: f"the request failed: {told}"}
  if not args.topology:
    fix = f"{what[state]}; have it made with --topology=v5e:4x4 or the like [--spot] [--queued]"
    raise UserError("name", args.name, fix)
  print(f"{args.name}: {what[state]}; it is requested now", file=sys.stderr)
  if state != ABSENT:
    _delete(args)
  create(args, [])
  return True


def _wait_until_ready(args) -> None:
  before = ""
  while True:
    state, told = _look(args)
    if state == READY:
      return
    if state == LOST:
      raise Failed("preempted", told, "run --topology=... makes it anew", True)
    if state in (FAILED, ABSENT):
      fix = "see why: gcloud compute tpus queued-resources describe; then delete it, and try another zone or size"
      raise Failed("the request failed", told or "it is gone", fix, False)
    if told != before:
      print(f"{args.name}: {told}; waiting", file=sys.stderr)
      before = told
    time.sleep(args.poll)


def _delete(args) -> None:
  # A queued resource takes its node along; a request that never got one has no node to delete.
  if _describe(args, "queued-resources", "state.state"):
    _call(args, gcloud(args, "queued-resources", "delete", "--force"))
  elif _describe(args, "tpu-vm", "state"):
    _call(args, gcloud(args, "tpu-vm", "delete"))


def copy(args, commit: str, code: str) -> None:
  """Puts the commit into the directory `code` of all workers, and installs it there."""
  file = f"reprise-{commit[:12]}.bundle"
  path = job.cache(args.dry_run) / file
  command.call(job.bundle(path), dry=args.dry_run)
  project = [f"--project={args.project}"] if args.project else []
  argv = ["gcloud", "compute", "tpus", "tpu-vm", "scp", str(path), f"{args.name}:", "--worker=all"]
  _call(args, [*argv, f"--zone={args.zone}", *project, "--quiet"])
  clone = f"git -c advice.detachedHead=false clone -q {file} {code}"
  _call(args, ssh(args, f"{{ [ -d {code} ] || {clone}; }} && bash {code}/launch/worker.sh setup"))


def _follow(args, remote: str) -> tuple[int | None, str]:
  """(exit status, "") of a run that came to its end; (None, why) of one that can go on."""
  ended: dict[str, int] = {}

  def heard(line: str) -> None:
    for host, number in _ENDED.findall(line):
      ended[host] = int(number)

  # No timeout: it takes as long as the run does, and ssh notices when a worker is gone.
  done = command.execute(ssh(args, remote), dry=args.dry_run, heard=heard)
  if done.status == 0:
    return 0, ""
  told = ", ".join(f"{host} {command.meaning(number)} ({number})" for host, number in ended.items() if number)
  for number in ended.values():
    if number in command.FINAL:
      return number, ""
  if command.STOPPED in ended.values():
    return runs.EXIT_INTERRUPTED, ""
  state, words = _look(args)
  if state != READY:
    return None, f"the pod is not ready: {words or state}"
  if any(number in command.AGAIN for number in ended.values()):
    return None, f"the run can go on: {told}"
  if not told or done.status == 255:
    failed = command.failure("gcloud", done)
    if failed.again or done.status == 255:
      return None, SILENT
    raise failed
  print(f"{args.name}: {told}", file=sys.stderr)
  return next(number for number in ended.values() if number), ""


if __name__ == "__main__":
  command.main(lambda: main(sys.argv[1:]))
