"""Several processes as one run: whether there are several, how they start, and how they end together.

The engine is jax.distributed: its coordination service, which process 0 holds, finds out
who is alive, carries the few words that processes have for each other, and brings a
SIGTERM to one of them before all. What is here decides when to start it, and sees to it
that no process outlives the others without a word: whatever happens to one, all are gone
within `HEARTBEAT_SECONDS` and a little, each with an exit status that says what to do.
"""

import argparse
from collections.abc import Callable
import ctypes
import importlib.util
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

import jax
from jax._src import clusters  # how jax finds its peers; nothing public tells it without starting them
from jax._src import distributed as runtime

from research.errors import UserError, check, first_line

START_SECONDS = 300  # for all processes to come; pods and nodes may start minutes apart
HEARTBEAT_SECONDS = 60  # without a sign of life a process counts as gone
EXIT_PEERS = 69  # EX_UNAVAILABLE

_GRACE = 10  # seconds in which processes that come to the same end get there by themselves
_ECHO = 2  # seconds in which the same line may come from process 0
_FOREVER_MS = 7 * 24 * 3600 * 1000  # waits that end because the other side comes, or because it is found dead


class PeersMissing(Exception):
  """The other processes could not be reached, or did not all come, in `START_SECONDS`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """--coordinator, --processes and --process."""
  group = parser.add_argument_group("several processes (on TPU pods, GKE and Slurm they find each other without these)")
  group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens, any free port")
  group.add_argument(
    "--processes", type=int, metavar="N", help="how many there are; 1: this one, whatever is around it"
  )
  group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")


def planned(args: argparse.Namespace) -> dict[str, Any] | None:
  """The arguments of jax.distributed.initialize for this process; None: it is the only one.

  Flags come before the environment, where the variables of Slurm, of TPU pods (GKE's, or
  the metadata of a TPU VM) and of indexed Kubernetes jobs count. Only whether there are
  several is decided here; who they are is left to jax. Starts nothing.

  Raises UserError for flags or variables that make no sense.
  """
  flags = {name: getattr(args, name) for name in ("coordinator", "processes", "process")}
  missing = [f"--{name}" for name, value in flags.items() if value is None]
  if not missing:
    return _from_flags(**flags)
  given = [f"--{name}" for name in flags if f"--{name}" not in missing]
  check(not given, "command line", " ".join(given), f"goes with {' and '.join(missing)}; give all three or none")
  found = {name: plan for name, find in _ENVIRONMENTS.items() if (plan := find()) is not None}
  check(len(found) < 2, "environment", " and ".join(found), "both tell of several processes; say it with --coordinator")
  return next(iter(found.values()), None)


def _from_flags(coordinator: str, processes: int, process: int) -> dict[str, Any] | None:
  host, _, port = coordinator.rpartition(":")
  ok = bool(host) and port.isdecimal() and 0 < int(port) < 2**16
  check(ok, "coordinator", coordinator or "''", "must be HOST:PORT, as in 10.0.0.2:8476")
  check(processes >= 1, "processes", processes, "use a positive number")
  check(0 <= process < processes, "process", process, f"must be from 0 to {processes - 1}: there are {processes}")
  if processes == 1:
    return None
  return {
    "coordinator_address": coordinator,
    "num_processes": processes,
    "process_id": process,
    "cluster_detection_method": "deactivate",
  }


def _from_slurm() -> dict[str, Any] | None:
  if not clusters.SlurmCluster.is_env_present():  # nor is it in a batch script that has not called srun
    return None
  # of this step; SLURM_NTASKS may be of the allocation around an interactive one
  tasks = _whole("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS")
  if tasks == 1:
    return None
  plan = {"cluster_detection_method": "slurm", "num_processes": tasks, "process_id": _whole("SLURM_PROCID")}
  per_node = re.findall(r"(?:^|,)(\d+)", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
  if set(per_node) == {"1"}:
    plan["local_device_ids"] = []  # all of the node's; jax would give each task one GPU
  return plan


def _from_tpu_pod() -> dict[str, Any] | None:
  platforms = os.environ.get("JAX_PLATFORMS", "")
  if platforms and "tpu" not in platforms.split(","):
    return None
  if clusters.GkeTpuCluster.is_env_present():
    slices = _whole("MEGASCALE_NUM_SLICES") if os.environ.get("MEGASCALE_NUM_SLICES") else 1
    several = len(clusters.GkeTpuCluster._get_worker_list_in_slice()) * slices > 1
    return {"cluster_detection_method": "gketpu"} if several else None
  try:
    several = clusters.GceTpuCluster.is_env_present() and clusters.GceTpuCluster.get_process_count() > 1
  except Exception:  # whatever comes of a metadata server that is not there: so no pod is
    return None
  return {"cluster_detection_method": "gcetpu"} if several else None


def _from_kubernetes() -> dict[str, Any] | None:
  indexed = "JOB_COMPLETION_INDEX" in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ
  if not indexed or clusters.GkeTpuCluster.is_env_present():
    return None
  index = _whole("JOB_COMPLETION_INDEX")
  if importlib.util.find_spec("kubernetes") is None:
    fix = "this pod is one of several; give --coordinator, --processes and --process, or install jax[k8s]"
    check(index == 0, "JOB_COMPLETION_INDEX", index, fix)
    return None
  try:
    several = clusters.K8sCluster.is_env_present() and clusters.K8sCluster.get_process_count() > 1
  except Exception as e:
    raise UserError("JOB_COMPLETION_INDEX", index, f"{first_line(e)}; or give --coordinator") from None
  return {} if several else None


_ENVIRONMENTS = {"Slurm": _from_slurm, "TPU": _from_tpu_pod, "Kubernetes": _from_kubernetes}


def _whole(name: str) -> int:
  text = os.environ[name]
  check(text.isdecimal(), name, text or "''", "must be a whole number; or use --coordinator, --processes, --process")
  return int(text)


class _Peers:
  """This process among several, from `start` to `leave`."""

  def __init__(self):
    self.client = None  # of the coordination service, once all are there
    self.index, self.count, self.address = None, None, None
    self.saved: Callable[[], list[int]] = list
    self.status = 0  # to exit with
    self.heard = time.monotonic()  # when all were known to live
    self.speaking = threading.Lock()  # one last line a process
    self.ended, self.alone = threading.Event(), threading.Event()

  def name(self, index: int) -> str:
    return f"process {index} of {self.count}"


_peers: _Peers | None = None


def several() -> bool:
  """Whether this process is one of several."""
  return _peers is not None


def start(args: argparse.Namespace) -> None:
  """Joins the other processes, if there are any. Call it before anything starts jax's backend.

  Raises UserError for a mistake in flags or environment, and PeersMissing. Where jax's
  runtime ends the process, that is told too, with the status `EXIT_PEERS`.
  """
  global _peers
  plan = planned(args)
  if plan is None:
    return
  address = plan.get("coordinator_address")
  if address is not None and plan["process_id"] == 0:
    _check_free(address)
  _peers = _Peers()
  # One that dies must not take the others along before they have said why: that is left to `_watch`.
  jax.config.update("jax_enable_recoverability", True)
  _on_abort(_aborted)
  try:
    jax.distributed.initialize(
      **plan, initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )
  except Exception as e:
    _on_abort(None)
    raise PeersMissing(f"the processes could not start together: {first_line(e)}") from None
  state = runtime.global_state
  _peers.index, _peers.count, _peers.address = state.process_id, state.num_processes, state.coordinator_address
  _peers.client = state.client
  for task in (_watch, _listen):
    threading.Thread(target=task, args=(_peers,), daemon=True).start()


def share(name: str, value: str = "") -> str:
  """Process 0's `value`, on all. Every process calls it once with each name."""
  if _peers is None:
    return value
  key = f"reprise/shared/{name}"
  if _peers.index == 0:
    _peers.client.key_value_set(key, value)
  return _peers.client.blocking_key_value_get(key, _FOREVER_MS)


def agree(name: str, value: str, fix: str) -> None:
  """Raises UserError on the processes whose `value` is not that of process 0."""
  check(share(name, value) == value, name, value, fix)


def on_restart(saved: Callable[[], list[int]]) -> None:
  """`saved()` are the steps that a restart could go on from; for the last line of a run whose peer is gone."""
  if _peers is not None:
    _peers.saved = saved


def leave(status: int, line: str = "") -> None:
  """Ends this process with `status`, after a last line on stderr; all processes end, with that status.

  Alone, or with status 0, it returns (with 0) when all have come here.
  Of the same line from all processes one is printed, without the number of the process.
  """
  peers = _peers
  if peers is None or peers.client is None:
    if line:
      print(line, file=sys.stderr)
    if status:
      sys.exit(status)
    return
  _try(peers.client.key_value_increment, "reprise/accounted for", 1)
  if status:
    if not peers.speaking.acquire(blocking=False):
      time.sleep(_FOREVER_MS / 1000)  # another thread is ending this process
    peers.status = status
    _try(peers.client.key_value_set, "reprise/stop", json.dumps([peers.index, status, line]))
  if peers.index == 0:
    _try(peers.client.key_value_set, "reprise/line", line)
  elif _try(peers.client.blocking_key_value_get, "reprise/line", 1000 * _ECHO if line else 1) == line:
    line = ""
  if line:
    print(line if peers.index == 0 else f"{peers.name(peers.index)}: {line}", file=sys.stderr, flush=True)
  _try(peers.client.wait_at_barrier, "reprise/end", _FOREVER_MS)
  if not status and (word := _try(peers.client.key_value_try_get, "reprise/stop")):
    status = json.loads(word)[1]  # of one whose mistake came when this one had done its part
  _disconnect(peers)
  if threading.current_thread() is not threading.main_thread():
    _exit(status)
  if status:
    sys.exit(status)


def fail(error: Exception) -> None:
  """Ends this process, one of several, after an exception that nobody foresaw: the death of a peer may be behind it.

  Where a peer is gone, `_watch` finds that out and ends this process. Otherwise the
  traceback is printed and the status is 1.
  """
  peers = _peers
  if peers.speaking.locked():
    time.sleep(_FOREVER_MS / 1000)  # another thread knows why, and is ending this process
  said = f"{type(error).__name__}: {first_line(error)}"
  told = f"{peers.name(peers.index)}: {said}; waiting to learn whether a process is gone"
  print(told, file=sys.stderr, flush=True)
  known, until = 1, time.monotonic() + HEARTBEAT_SECONDS + 10
  _try(peers.client.key_value_increment, "reprise/accounted for", 1)
  while known < peers.count and time.monotonic() < until:  # all: then it is a defect, and nobody is gone
    time.sleep(0.5)
    known = _try(peers.client.key_value_increment, "reprise/accounted for", 0) or 0
  traceback.print_exception(error)
  leave(1, f"error: {said}")


def _disconnect(peers: _Peers) -> None:
  """Takes leave of the coordination service: process 0, which holds it, after the others."""
  peers.ended.set()
  if peers.index == 0:
    peers.alone.wait(10)
  _try(jax.distributed.shutdown)
  _on_abort(None)


def _watch(peers: _Peers) -> None:
  """Ends this process when another one is gone."""
  everyone = set(range(peers.count))
  while not (peers.ended.is_set() and peers.index):
    live = _try(peers.client.get_live_nodes, sorted(everyone))  # returns when all that live have asked
    if live is not None:
      peers.heard = time.monotonic()
    if live is not None and set(live) != everyone:
      if peers.ended.is_set():
        if set(live) == {0}:
          peers.alone.set()
          return
      else:
        _gone(peers, sorted(everyone - set(live)))
    time.sleep(0.1 if peers.ended.is_set() else 1)


def _listen(peers: _Peers) -> None:
  """Ends this process when another one says that it ends with a mistake that this one has not made."""
  word = None
  while word is None and not peers.ended.is_set():
    word = _try(peers.client.blocking_key_value_get, "reprise/stop", 10_000)
  time.sleep(_GRACE)
  if word is not None and not peers.status:
    index, status, line = json.loads(word)
    leave(status, f"{peers.name(index)}: {line}" if peers.index == 0 else "")


def _gone(peers: _Peers, who: list[int]) -> None:
  """Ends this process, for `who` have; from any thread."""
  if peers.speaking.acquire(blocking=False):
    steps = _try(peers.saved)
    start = f"go on from step {steps[-1]}" if steps else "begin again"
    names = ", ".join(map(str, who)) + f" of {peers.count}"
    said = f"error: process {names} is gone" if len(who) == 1 else f"error: processes {names} are gone"
    print(f"{said}; start all of them again to {start}", file=sys.stderr, flush=True)
    if peers.index == 0:
      time.sleep(_ECHO)  # with this process the service goes, from which the others hear the same
  elif not peers.status:
    return  # another thread is saying it
  _exit(peers.status or EXIT_PEERS)


def _aborted(number: int) -> None:
  """jax's runtime has lost the coordination service, and aborts the process at once."""
  signal.alarm(10)  # whatever happens now
  peers = _peers
  if peers.client is None:
    where = runtime.global_state.coordinator_address
    told = "not all processes came" if _answers(where) else f"nothing answers at {where}, where process 0 should be"
    told += f" ({START_SECONDS} s); start all of them, with the same coordinator"
    print(f"error: {told}", file=sys.stderr, flush=True)
    _exit(EXIT_PEERS)
  lost = time.monotonic() - peers.heard > HEARTBEAT_SECONDS / 2 or not _answers(peers.address)
  if peers.ended.is_set() or peers.index == 0 or not lost:
    return  # to abort for another reason, with the runtime's own words
  _gone(peers, [0])
  time.sleep(10)  # another thread is telling it


def _on_abort(handler: Callable[[int], None] | None) -> None:
  """Calls `handler` in the thread that aborts the process: Python's own signal handlers wait for the main one."""
  global _kept
  _kept = _HANDLER(handler) if handler else None
  libc = ctypes.CDLL(None)
  libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
  libc.signal(signal.SIGABRT, ctypes.cast(_kept, ctypes.c_void_p) if _kept else signal.SIG_DFL)


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_kept = None


def _answers(address: str) -> bool:
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
  except OSError:
    return False
  return True


def _check_free(address: str) -> None:
  """jax's runtime crashes where it cannot listen."""
  port = int(address.rpartition(":")[2])
  try:
    socket.create_server(("", port)).close()
  except OSError as e:
    raise UserError("coordinator", address, f"process 0 cannot listen there: {e.strerror}; use another port") from None


def _try(f: Callable, *args) -> Any:
  """`f(*args)`, or None where the service does not answer: it is for `_watch` and `_aborted` to say so."""
  try:
    return f(*args)
  except Exception:
    return None


def _exit(status: int) -> None:
  """At once: the main thread may hang in a collective for good."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)
