"""Several processes are one run: the same losses, checkpoints and endings. Real processes, real signals, gloo."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

from jax._src.clusters import cloud_tpu_cluster
import numpy as np
import pytest

from research import distributed, run, writers
from research.errors import UserError

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


# Which processes: decided before anything starts.

GKE = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}
SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
SLURM |= {"SLURM_LOCALID": "0"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
FLAGS = ["--coordinator=10.0.0.2:8476", "--processes=4", "--process=3"]
OF_FLAGS = {"coordinator_address": "10.0.0.2:8476", "num_processes": 4, "process_id": 3}
OF_FLAGS |= {"cluster_detection_method": "deactivate"}
OF_SLURM = {"cluster_detection_method": "slurm", "num_processes": 2, "process_id": 1}
OF_GKE = {"cluster_detection_method": "gketpu"}

# (what, variables, flags, whether the machine has TPU chips, the plan or what the one line says)
PLACES = [
  ("laptop", {}, [], False, None),
  ("TPU VM of one host", {}, [], True, None),
  ("GKE pod of one host", {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, [], True, None),
  ("TPU pod of four hosts", GKE, [], True, OF_GKE),
  ("two slices of one host", GKE | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, [], True, OF_GKE),
  ("JobSet on a TPU pod", GKE | POD | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}, [], True, OF_GKE),
  ("TPU pod, on its CPUs", GKE | {"JAX_PLATFORMS": "cpu"}, [], True, None),
  ("TPU variables without a TPU", GKE, [], False, None),
  ("slices that are no number", GKE | {"MEGASCALE_NUM_SLICES": "two"}, [], True, "MEGASCALE_NUM_SLICES=two"),
  ("Slurm, one task", SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, [], False, None),
  ("Slurm, two tasks", SLURM, [], False, OF_SLURM),
  ("Slurm, one a node", SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, [], False, OF_SLURM | {"local_device_ids": []}),
  ("Slurm, two a node", SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2"}, [], False, OF_SLURM),
  ("Slurm, a shell in an allocation", SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, [], False, None),
  ("Slurm, a script without srun", {k: v for k, v in SLURM.items() if "STEP" not in k}, [], False, None),
  ("Slurm, broken", SLURM | {"SLURM_NTASKS": "2x"}, [], False, "SLURM_NTASKS=2x: must be a whole number"),
  ("Slurm and a TPU pod", SLURM | GKE, [], True, "environment=Slurm and TPU: both tell of several"),
  ("any pod", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, [], False, None),
  ("the first of an indexed job", POD, [], False, None),
  ("the second", POD | {"JOB_COMPLETION_INDEX": "1"}, [], False, "JOB_COMPLETION_INDEX=1: this pod is one of several"),
  ("flags", {}, FLAGS, False, OF_FLAGS),
  ("flags in Slurm", SLURM, FLAGS, False, OF_FLAGS),
  ("flags on a pod", POD | GKE, FLAGS, True, OF_FLAGS),
  ("flags that say alone", SLURM, ["--coordinator=x:1", "--processes=1", "--process=0"], False, None),
  ("two of the flags", {}, FLAGS[:2], False, "--coordinator --processes: goes with --process"),
  ("one of the flags", SLURM, FLAGS[1:2], False, "--processes: goes with --coordinator and --process"),
  ("no port", {}, ["--coordinator=x", *FLAGS[1:]], False, "coordinator=x: must be HOST:PORT"),
  ("a bad port", {}, ["--coordinator=x:80a", *FLAGS[1:]], False, "coordinator=x:80a: must be HOST:PORT"),
  ("too high a port", {}, ["--coordinator=x:65536", *FLAGS[1:]], False, "coordinator=x:65536: must be HOST:PORT"),
  ("an empty coordinator", {}, ["--coordinator=", *FLAGS[1:]], False, "coordinator='': must be HOST:PORT"),
  ("process of too few", {}, [*FLAGS[:2], "--process=4"], False, "process=4: must be from 0 to 3"),
  ("process below 0", {}, [*FLAGS[:2], "--process=-1"], False, "process=-1: must be from 0 to 3"),
  ("no processes", {}, [FLAGS[0], "--processes=0", "--process=0"], False, "processes=0: use a positive number"),
  ("processes in words", {}, [FLAGS[0], "--processes=two", "--process=0"], False, "invalid int value: 'two'"),
]


@pytest.mark.parametrize(
  ("variables", "flags", "chips", "expected"), [p[1:] for p in PLACES], ids=[p[0] for p in PLACES]
)
def test_who_the_processes_are_is_decided_from_flags_or_the_environment(variables, flags, chips, expected, monkeypatch):
  for name in list(os.environ):
    if name.startswith(("SLURM_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_", "JAX_", "OMPI_")):
      monkeypatch.delenv(name)
  for name, value in ({"TPU_SKIP_MDS_QUERY": "1"} | variables).items():  # no metadata server is asked
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", chips)
  parse = lambda: distributed.planned(run.parse_args(["--config=x.py", *flags])[0])
  if isinstance(expected, str):
    with pytest.raises(UserError, match=re.escape(expected)) as error:
      parse()
    assert "\n" not in str(error.value)
  else:
    assert parse() == expected


# One run.


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  """Six steps on four devices in one process, which all others must reproduce, and the rows that it took."""
  logs = tmp_path_factory.mktemp("one")
  go(1, 4, logs / "run", environment=lambda i: {"ROWS": str(logs / "rows")})
  return logs


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """The same in two processes."""
  logs = tmp_path_factory.mktemp("two")
  launch = go(2, 2, logs / "run", environment=lambda i: {"ROWS": str(logs / "rows")})
  assert launch.told(1) == ""  # process 0 speaks for all
  return logs


@pytest.fixture(scope="module")
def four(tmp_path_factory):
  """The same in four."""
  logs = tmp_path_factory.mktemp("four")
  go(4, 1, logs / "run", environment=lambda i: {"ROWS": str(logs / "rows")})
  return logs


def same_losses(several, one):
  # gloo sums in another order than one process does
  assert [r["step"] for r in history(several)] == [r["step"] for r in history(one)]
  np.testing.assert_allclose(losses(several), losses(one), rtol=1e-6)


def same_rows(several, one, processes):
  whole = np.load(one / "rows-0.npy")
  parts = [np.load(several / f"rows-{i}.npy") for i in range(processes)]
  assert {part.shape[1] for part in parts} == {whole.shape[1] // processes}
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)  # complete, and in the same places
  trained = whole[[1, 2, 3, 5, 6, 7]].reshape(48, -1)  # between evaluations
  assert len(np.unique(trained, axis=0)) == 48  # disjoint: no row is there twice


def test_two_processes_give_the_losses_of_one(one, two):
  same_losses(two / "run", one / "run")
  manifest = json.loads((two / "run" / "manifest.json").read_text())
  assert [launch["processes"] for launch in manifest["launches"]] == [2]
  assert (two / "run" / "report" / "results.json").exists()


def test_two_processes_take_the_rows_of_one_each_row_once(one, two):
  same_rows(two, one, 2)


@pytest.mark.slow
def test_four_processes_give_the_losses_of_one_and_take_its_rows(one, four):
  same_losses(four / "run", one / "run")
  same_rows(four, one, 4)


# What was saved by some is restored by others.

RESTORES = """
import hashlib, json, pathlib
import jax
from jax.experimental import multihost_utils
import numpy as np
from experiments.kvshift.experiment import build
from research import config, distributed, run, runs
from research.checkpoint import Checkpoints, _flatten, _plain
from research.fit import abstract_state
from research.mesh import on_devices

args, overrides = run.parse_args()
distributed.start(args)
cfg = config.expand(config.load(args.config, overrides))[0][1]
mesh, exp = run.prepare(build, cfg)
with jax.set_mesh(mesh):
  checkpoints = Checkpoints(runs.checkpoint_dir(pathlib.Path(args.workdir), "kvshift", cfg.seed))
  restored = checkpoints.restore(on_devices(abstract_state(exp)))
  assert restored.step == 6 and not checkpoints.reports
  arrays = {name: _plain(x) for name, x in _flatten(restored.state)[0].items()}
  whole = {name: np.asarray(multihost_utils.process_allgather(x, tiled=True)) for name, x in arrays.items()}
told = {name: [str(x.shape), str(x.dtype), hashlib.sha256(x.tobytes()).hexdigest()] for name, x in whole.items()}
pathlib.Path(args.workdir, f"restored-{jax.process_count()}-{jax.process_index()}.json").write_text(json.dumps(told))
distributed.leave(0)
"""


@pytest.mark.slow
def test_what_four_processes_saved_is_restored_by_two_and_by_one(four):
  for processes, devices in ((4, 1), (2, 2), (2, 1), (1, 1)):
    go(processes, devices, four / "run", driver=RESTORES)
  told = [json.loads(path.read_text()) for path in sorted((four / "run").glob("restored-*.json"))]
  assert len(told) == 4 + 2 + 1
  assert len(told[0]) > 20
  assert all(t == told[0] for t in told)


@pytest.mark.slow
def test_a_run_of_four_goes_on_with_two_and_with_one(one, four, tmp_path):
  for processes, devices in ((2, 1), (1, 4)):
    workdir = tmp_path / str(processes)
    shutil.copytree(four / "run", workdir)
    shutil.rmtree(workdir / RUN / "6")
    launch = go(processes, devices, workdir)
    assert "going on from step 3" in launch.told(0)
    same_losses(workdir, one / "run")


# Ends.

LONG = ("--config.steps=120", "--config.checkpoint.every=4", "--config.eval_every=50")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """120 steps of two processes that nothing interrupted."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  go(2, 1, workdir, *LONG)
  return workdir


def same(workdir, other):
  assert history(workdir) == history(other)
  assert hashes(workdir) == hashes(other)


def kill_one(processes, victim, workdir):
  """Kills one of a run; the others must end in time, and all say so."""
  with Launch(processes, 1, workdir.parent, f"--workdir={workdir}", *LONG) as launch:
    wait_for(launch, lambda: logged(workdir) >= 20)
    launch.processes[victim].kill()
    expected = [run.EXIT_PEERS] * processes
    expected[victim] = -signal.SIGKILL
    assert launch.end(within=ENDS) == expected, launch.told()
    saved = steps(workdir)[-1]
    assert saved >= 4
    for i in set(range(processes)) - {victim}:
      gone = f"error: process {victim} of {processes} is gone; start all of them again to go on from step {saved}"
      assert launch.last(i) == gone, launch.told()
  return saved


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_is_killed_and_a_restart_ends_the_same(whole, tmp_path, victim):
  saved = kill_one(2, victim, tmp_path / "run")
  launch = go(2, 1, tmp_path / "run", *LONG)
  assert f"going on from step {saved}" in launch.told(0)
  same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_hangs_is_left_behind(tmp_path, victim):
  workdir = tmp_path / "run"
  with Launch(2, 1, tmp_path, f"--workdir={workdir}", *LONG) as launch:
    wait_for(launch, lambda: logged(workdir) >= 20)
    launch.processes[victim].send_signal(signal.SIGSTOP)
    assert launch.processes[1 - victim].wait(timeout=ENDS) == run.EXIT_PEERS
    assert launch.last(1 - victim).startswith(f"error: process {victim} of 2 is gone; ")
    launch.processes[victim].send_signal(signal.SIGCONT)
    assert launch.processes[victim].wait(timeout=ENDS) != 0


@pytest.mark.slow
def test_one_of_four_is_killed_and_two_go_on(tmp_path):
  kill_one(4, 2, tmp_path / "run")
  go(2, 2, tmp_path / "run", *LONG)
  assert steps(tmp_path / "run")[-1] == 120


@pytest.mark.slow
@pytest.mark.parametrize(("told", "number"), [(0, signal.SIGTERM), (1, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_signal_to_one_saves_on_all_and_a_restart_ends_the_same(whole, tmp_path, told, number):
  workdir = tmp_path / "run"
  with Launch(2, 1, tmp_path, f"--workdir={workdir}", *LONG) as launch:
    wait_for(launch, lambda: logged(workdir) >= 6)
    launch.processes[told].send_signal(number)
    assert launch.end() == [run.EXIT_INTERRUPTED] * 2, launch.told()
    saved = steps(workdir)[-1]
    assert launch.last(0) == f"interrupted; saved at step {saved}; run the same command again to go on"
    assert "Traceback" not in launch.told()
  assert saved < 120
  go(2, 1, workdir, *LONG)
  same(workdir, whole)


@pytest.mark.slow
def test_a_mistake_of_one_ends_all_with_its_status_and_its_words(tmp_path):
  port = free_port()

  def flags(i):
    wrong = ["--config.tx.lrr=1"] if i == 1 else []
    return [f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process={i}", *wrong]

  with Launch(2, 1, tmp_path, f"--workdir={tmp_path / 'run'}", *LONG, flags=flags) as launch:
    assert launch.end() == [2, 2], launch.told()
    assert launch.last(1) == "process 1 of 2: error: tx.lrr=1: no such field; did you mean tx.lr?"
    assert launch.last(0) == launch.last(1)


@pytest.mark.slow
def test_a_defect_of_one_ends_all_with_its_traceback(tmp_path):
  broken = DRIVER.replace("taken.append", "1 / jax.process_index() - 1; taken.append")  # process 0 divides by zero
  rows = lambda i: {"ROWS": str(tmp_path / "rows")}
  with Launch(2, 1, tmp_path, f"--workdir={tmp_path / 'run'}", environment=rows, driver=broken) as launch:
    assert launch.end(within=60 + HEARTBEAT) == [1, 1], launch.told()
    assert launch.last(0) == "error: ZeroDivisionError: division by zero"
    assert "Traceback" in launch.told(0)
    assert "Traceback" not in launch.told(1)


@pytest.mark.slow
def test_process_0_draws_a_report_out_of_checkpoints_while_the_others_wait(tmp_path):
  go(2, 1, tmp_path / "run", "--config.report=learned")
  assert (tmp_path / "run" / "report" / "coefficients.png").exists()


@pytest.mark.slow
def test_a_mistake_of_all_is_told_once(tmp_path):
  with Launch(2, 1, tmp_path, f"--workdir={tmp_path / 'run'}", "--config.tx.lrr=1") as launch:
    assert launch.end() == [2, 2], launch.told()
    assert launch.last(0) == "error: tx.lrr=1: no such field; did you mean tx.lr?"
    assert launch.told(1) == ""


@pytest.mark.slow
@pytest.mark.parametrize(("what", "says"), [("config", "--config.tx.lr=1e-4"), ("workdir", None)])
def test_processes_that_were_started_differently_are_told_apart(tmp_path, what, says):
  port = free_port()

  def flags(i):
    mine = [says] if says and i == 1 else []
    where = [f"--workdir={tmp_path / ('run' if says or i == 0 else 'other')}"]
    return [f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process={i}", *mine, *where]

  with Launch(2, 1, tmp_path, flags=flags) as launch:
    assert launch.end() == [2, 2], launch.told()
    assert launch.last(1).startswith(f"process 1 of 2: error: {what}="), launch.told()
    assert "process 0 has" in launch.last(1)


@pytest.mark.slow
def test_processes_that_do_not_come_are_not_waited_for_for_ever(tmp_path):
  for process, says in ((0, "not all processes came (5 s)"), (1, "nothing answers at 127.0.0.1:")):
    one = lambda i, process=process: [f"--coordinator=127.0.0.1:{free_port()}", "--processes=3", f"--process={process}"]
    begun = time.monotonic()
    with Launch(2, 1, tmp_path, flags=one, environment=lambda i: {"START": "5"}) as launch:
      assert launch.end(within=60) == [run.EXIT_PEERS] * 2, launch.told()
      assert time.monotonic() - begun < 45
      assert launch.last(0).startswith(f"error: {says}"), launch.told()


@pytest.mark.slow
def test_a_port_that_is_taken_is_a_mistake(tmp_path):
  with socket.create_server(("", 0)) as taken:
    port = taken.getsockname()[1]
    flags = lambda i: [f"--coordinator=127.0.0.1:{port}", "--processes=2", "--process=0"]
    with Launch(2, 1, tmp_path, flags=flags) as launch:
      assert launch.end() == [2, 2]
      assert launch.told(0).startswith(f"error: coordinator=127.0.0.1:{port}: process 0 cannot listen there")


@pytest.mark.slow
def test_two_tasks_of_slurm_find_each_other(one, tmp_path):
  slurm = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
  port = {"JAX_COORDINATOR_PORT": str(free_port())}
  go(2, 2, tmp_path / "run", flags=lambda i: [], environment=lambda i: {**slurm, **port, "SLURM_PROCID": str(i)})
  same_losses(tmp_path / "run", one / "run")
