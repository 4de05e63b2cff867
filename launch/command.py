"""Vendors' command-line tools: shown as they are run, and their failures told in one line with the fix.

Exit status of every launcher: 0 done; 2 something to fix, told in one line; 3 and 74 as
the run itself ended (see research/run.py); 75 worth running again.
"""

from collections import deque
from collections.abc import Callable, Sequence
import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

from research import run as runs
from research.errors import UserError

# What launch/worker.sh says of a run that the command `stop` has ended.
STOPPED = 130

# What the run's exit statuses mean, for tables and last lines.
MEANING = {
  0: "done",
  runs.EXIT_USER: "a mistake in the command or the config",
  runs.EXIT_DIVERGED: "not finite; the last good checkpoint stays",
  runs.EXIT_PEERS: "another of its processes is gone",
  runs.EXIT_SAVE: "a checkpoint could not be written",
  runs.EXIT_INTERRUPTED: "interrupted after saving",
  STOPPED: "stopped by hand; the same command goes on",
}

# A run that ended so would end so again.
FINAL = (runs.EXIT_USER, runs.EXIT_DIVERGED, runs.EXIT_SAVE)

# One that ended so goes on when it is started again; 143 is a second SIGTERM, which ends it at once.
AGAIN = (runs.EXIT_INTERRUPTED, runs.EXIT_PEERS, 143)


def meaning(status: int) -> str:
  """What an exit status of a run says, in a few words."""
  if status not in MEANING and (status < 0 or status > 128):
    number = -status if status < 0 else status - 128
    name = signal.Signals(number).name if number in {s.value for s in signal.Signals} else f"signal {number}"
    return f"killed by {name}" + (", out of memory perhaps" if number == signal.SIGKILL else "")
  return MEANING.get(status, "failed; the traceback is in its log")


# (kind, what the tools say, the fix, whether to try again); the first that matches is told.
# The phrases are those of gcloud, GKE and Slurm as quoted in their documentation and trackers.
_KINDS = (
  (
    "no network",  # gcloud tells it as a failed sign-in too
    r"Max retries exceeded|NameResolution|[Nn]ame resolution|Network is unreachable|Could not resolve host",
    "see whether this machine is online",
    True,
  ),
  (
    "not signed in",
    r"gcloud auth login|active account selected|UNAUTHENTICATED|Reauthentication|default credentials|invalid_grant",
    "run: gcloud auth login && gcloud auth application-default login",
    False,
  ),
  (
    "no project",
    r"core/project|project.*must be specified",
    "name it: --project=ID, or gcloud config set project ID",
    False,
  ),
  (
    "no capacity",
    r"no more capacity|[Ii]nsufficient (reserved )?capacity|STOCKOUT|POOL_EXHAUSTED|not have enough resources"
    r"|not enough resources|resource_availability",
    "wait in the queue with --queued, use --spot, or try another --zone",
    True,
  ),
  (
    "quota",
    r"[Qq]uota|QUOTA",
    "ask for more quota for this kind of chip in this region, or free some: gcloud compute tpus queued-resources list",
    False,
  ),
  (
    "not allowed",
    r"PERMISSION_DENIED|not have permission|has not been used in project|SERVICE_DISABLED|HTTPError 403",
    "enable the API, or have the role granted that the message names; check: gcloud config get project",
    False,
  ),
  ("preempted", r"PREEMPTED|[Pp]reempted|terminal state", "run with --topology makes it anew", True),
  (
    "under maintenance",
    r"maintenance event|cannot be currently connected",
    "it comes back by itself; see status",
    True,
  ),
  ("key not in the agent", r"SSH Key is not present", "run: ssh-add ~/.ssh/google_compute_engine", False),
  ("exists already", r"ALREADY_EXISTS|already exists", "use it, delete it, or take another name", False),
  ("not found", r"NOT_FOUND|was not found|does not exist", "check the name, the zone and the project", False),
  (
    "a worker does not answer",
    r"return code \[?255|Connection (timed out|refused|closed|reset)|Operation timed out|Host key verification"
    r"|ssh: connect|Could not SSH|failed to connect to backend",
    "see its state with status; a worker that stays silent: delete the pod and create it again",
    True,
  ),
  (
    "the service is unwell",
    r"UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|HTTPError 50\d|[Tt]ry again|Unable to contact slurm|Socket timed out",
    "try again in some minutes",
    True,
  ),
  (
    "refused by Slurm",
    r"[Ii]nvalid (partition|account|qos|generic resource)|Requested node configuration|Batch job submission failed",
    "check --partition, --account, --time and --gpus-per-node against: sinfo -o '%P %l %G'",
    False,
  ),
)

_INSTALL = {
  "gcloud": "install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install",
  "xpk": "install it: pip install xpk (and kubectl, gke-gcloud-auth-plugin)",
  "kubectl": "install it: gcloud components install kubectl gke-gcloud-auth-plugin",
  "sbatch": "run this on a login node of the Slurm cluster",
}


class Failed(Exception):
  """A vendor's tool failed. One line; `kind` names the failure, `again` says whether a retry is worth it."""

  def __init__(self, kind: str, said: str, fix: str, again: bool):
    self.kind, self.again = kind, again
    super().__init__(f"{kind}: {said}; {fix}" if said else f"{kind}; {fix}")


@dataclasses.dataclass(frozen=True)
class Done:
  """How a command ended: its exit status, what it printed, and what of that went to stderr."""

  status: int
  text: str
  errors: str = ""


def main(f: Callable[[], int | None]) -> None:
  """Calls `f()` and exits with its status; whatever can be expected to go wrong ends in one line."""
  try:
    sys.exit(outcome(f))
  except KeyboardInterrupt:
    print("stopped watching; what runs elsewhere goes on, and the same command watches it again", file=sys.stderr)
    sys.exit(runs.EXIT_INTERRUPTED)


def outcome(f: Callable[[], int | None]) -> int:
  """The exit status of `f()`, a UserError and a Failed being told in one line."""
  try:
    return f() or 0
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    return runs.EXIT_USER
  except Failed as e:
    print(f"error: {e}", file=sys.stderr)
    return runs.EXIT_INTERRUPTED if e.again else runs.EXIT_USER


def execute(
  argv: Sequence[str],
  dry: bool = False,
  timeout: float | None = None,
  echo: bool = True,
  heard: Callable[[str], None] | None = None,
) -> Done:
  """Shows the shell line and runs it. With `dry` it is only shown, and ends well having said nothing.

  The command gets no terminal, so it cannot ask anything. echo: its output is passed on
  line by line, stdout and stderr together; else neither it nor the shell line is shown.
  heard: is called with every line. Raises Failed if the tool is not installed or is not
  done after `timeout` seconds.
  """
  if dry or echo:
    print(shlex.join(argv) if dry else f"$ {shlex.join(argv)}", flush=True)
  if dry:
    return Done(0, "")
  try:
    process = subprocess.Popen(
      argv,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT if echo or heard else subprocess.PIPE,
      text=True,
      errors="replace",
      start_new_session=True,  # so that what it started ends with it
    )
  except FileNotFoundError:
    fix = _INSTALL.get(argv[0], "install it")
    raise Failed(f"{argv[0]} is not installed", "", fix, False) from None
  late = threading.Event()
  timer = threading.Timer(timeout or 0, lambda: (late.set(), _kill(process)))
  timer.daemon = True
  if timeout:
    timer.start()
  try:
    with process:
      try:
        if echo or heard:
          lines: deque[str] = deque(maxlen=5000)
          for line in process.stdout:
            if echo:
              print(line, end="", flush=True)
            lines.append(line)
            if heard:
              heard(line)
          text, errors = "".join(lines), ""
        else:
          text, errors = process.communicate()
      except BaseException:
        _kill(process)
        raise
  finally:
    timer.cancel()
  if late.is_set():
    fix = "a worker may be down: see its state with status, or allow more with --timeout"
    raise Failed(f"{argv[0]} does not answer", f"no end after {timeout:g} s", fix, True)
  return Done(process.returncode, text, errors)


def call(argv: Sequence[str], **options) -> str:
  """What the command printed; options as `execute` has them. Raises Failed, its kind told, if it fails."""
  done = execute(argv, **options)
  if done.status != 0:
    raise failure(argv[0], done)
  return done.text


def failure(tool: str, done: Done) -> Failed:
  """The Failed that a command's output tells."""
  said = done.errors or done.text
  lines = [line.strip() for line in said.splitlines() if line.strip()][-30:]
  for kind, pattern, fix, again in _KINDS:
    found = [line for line in lines if re.search(pattern, line)]
    if found:
      return Failed(kind, _shorten(found[-1]), fix, again)
  last = _shorten(lines[-1]) if lines else "it said nothing"
  return Failed(f"{tool} failed with status {done.status}", last, "see its output above", False)


def retrying(f: Callable[[], str], retries: int, pause: float) -> str:
  """`f()`, tried again up to `retries` times, at growing intervals, after a Failed that is worth it."""
  for attempt in range(retries + 1):
    try:
      return f()
    except Failed as e:
      if not e.again or attempt == retries:
        raise
      wait(e, attempt + 1, retries, pause)
  raise AssertionError


def wait(why: object, attempt: int, retries: int, pause: float, grow: bool = True) -> None:
  """Tells why there will be attempt number `attempt` of `retries`, and sleeps before it.

  That is `pause` seconds, twice as long each time if it is to `grow`, 10 minutes at most.
  """
  seconds = min(pause * 2 ** (attempt - 1 if grow else 0), 600)
  print(f"again in {seconds:g} s ({attempt} of {retries}): {why}", file=sys.stderr, flush=True)
  time.sleep(seconds)


def add_common(parser, retries: str | None = None) -> None:
  """The flags that launchers share. retries: what it is that is tried again, or None for nothing."""
  parser.add_argument("--dry-run", action="store_true", help="print the exact commands, run none of them")
  parser.add_argument(
    "--timeout", type=positive, default=1800.0, metavar="S", help="seconds that one command may take (%(default)g)"
  )
  if retries:
    add_retries(parser, retries)
    parser.add_argument(
      "--poll",
      type=positive,
      default=30.0,
      metavar="S",
      help="seconds between looks, and the first pause (%(default)g)",
    )


def add_retries(parser, what: str) -> None:
  """The flag --retries, how often to do `what`."""
  parser.add_argument("--retries", type=count, default=20, metavar="N", help=f"how often {what} (%(default)s)")


def positive(text: str) -> float:
  """argparse's type of a positive number."""
  value = float(text)
  if not value > 0:
    raise ValueError
  return value


def count(text: str) -> int:
  """argparse's type of a whole number of at least 0."""
  value = int(text)
  if value < 0:
    raise ValueError
  return value


def _kill(process: subprocess.Popen) -> None:
  for number in (signal.SIGTERM, signal.SIGKILL):
    try:
      os.killpg(process.pid, number)
      process.wait(timeout=5)
    except ProcessLookupError:
      return
    except subprocess.TimeoutExpired:
      continue


def _shorten(line: str) -> str:
  return line if len(line) <= 300 else line[:297] + "..."
