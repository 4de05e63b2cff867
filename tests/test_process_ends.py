"""No process outlives the others without a word: whatever ends one ends all, with a status that says what to do."""

import signal
import socket
import time

import pytest

from research import run
from tests.processes import DRIVER, ENDS, HEARTBEAT, Launch, free_port, go, hashes, history, logged, steps, wait_for

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
