"""What a worker does by itself: a run outlives its connection, is not started twice, and is stopped before the next."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "worker.sh"
# Says how often it was started, and goes on until a file appears.
CODE = """
import os, pathlib, signal, sys, time
home = pathlib.Path.home()
with (home / "started").open("a") as f:
  f.write("x")
signal.signal(signal.SIGTERM, lambda *a: sys.exit(75))
print("at work", flush=True)
while not (home / "go").exists():
  time.sleep(0.05)
sys.exit(3)
"""


@pytest.fixture
def worker(tmp_path):
  """worker(verb, attempt): a connection to a worker that lasts until its run ends."""
  made = []

  def connect(verb: str, attempt: str, *variables: str, code: str = CODE) -> subprocess.Popen:
    path = f"{tmp_path}/bin:/usr/bin:/bin"
    env = {"HOME": str(tmp_path), "PATH": path, "REPRISE_PYTHON": sys.executable}
    command = ["bash", str(SCRIPT), verb, "pod", attempt, *variables, "--", "-S", "-c", code]
    made.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True))
    return made[-1]

  yield connect
  (tmp_path / "go").touch()
  for process in made:
    process.kill()
    process.communicate()


def until(path: pathlib.Path, text: str) -> None:
  for _ in range(1500):
    if path.exists() and text in path.read_text():
      return
    time.sleep(0.02)
  raise AssertionError(path)


def test_a_lost_connection_ends_nothing_and_the_same_try_is_watched_again(worker, tmp_path):
  first = worker("start", "1")
  until(tmp_path / "reprise-runs/pod/log", "at work")
  os.killpg(first.pid, 9)
  second = worker("start", "1")
  until(tmp_path / "reprise-runs/pod/try", "1")
  (tmp_path / "go").touch()
  assert second.wait(20) == 3
  assert second.stdout.read().splitlines()[-1].endswith("ended with 3")
  # asked once more, it tells the end again
  third = worker("again", "1")
  assert third.wait(20) == 3
  assert (tmp_path / "started").read_text() == "x"


def test_start_joins_what_runs_and_again_stops_it_first(worker, tmp_path):
  worker("start", "1")
  until(tmp_path / "reprise-runs/pod/log", "at work")
  joined = worker("start", "2")
  until(tmp_path / "reprise-runs/pod/try", "2")
  assert (tmp_path / "started").read_text() == "x"
  anew = worker("again", "3")
  until(tmp_path / "started", "xx")
  (tmp_path / "go").touch()
  assert anew.wait(20) == 3
  assert joined.wait(20) in (75, 3)  # the end that it was there for, or the next one if that came at once


def test_start_does_not_take_another_run_for_its_own(worker, tmp_path):
  worker("start", "1")
  until(tmp_path / "reprise-runs/pod/log", "at work")
  other = worker("start", "2", code="print('something else')")
  assert other.wait(20) == 2
  assert "error: name=pod: something else runs there" in other.stdout.read()
  assert (tmp_path / "started").read_text() == "x"


def test_a_run_that_is_stopped_by_hand_is_told_so_to_who_watches(worker, tmp_path):
  watched = worker("start", "1")
  until(tmp_path / "reprise-runs/pod/log", "at work")
  assert (
    subprocess.run(
      ["bash", str(SCRIPT), "stop", "pod"], env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, check=False
    ).returncode
    == 0
  )
  assert watched.wait(20) == 130
  assert (tmp_path / "reprise-runs/pod/status").read_text() == "75\n"


def test_a_killed_run_is_told_as_such(worker, tmp_path):
  watched = worker("start", "1")
  until(tmp_path / "reprise-runs/pod/log", "at work")
  os.kill(int((tmp_path / "reprise-runs/pod/pid").read_text()), 9)
  assert watched.wait(20) == 137


def test_a_secret_comes_from_the_secret_manager_and_is_in_no_file(worker, tmp_path):
  (tmp_path / "bin").mkdir()
  gcloud = tmp_path / "bin" / "gcloud"
  gcloud.write_text('#!/bin/sh\n[ "$5" = --secret=HF_TOKEN ] && printf the-%s value\n')
  gcloud.chmod(0o755)
  run = worker(
    "start", "1", "HF_TOKEN", code="import os, sys; sys.exit(3 if os.environ['HF_TOKEN'][::-1] == 'eulav-eht' else 4)"
  )
  assert run.wait(20) == 3
  assert "the-value" not in run.stdout.read()
  files = [f for f in tmp_path.rglob("*") if f.is_file()]
  assert len(files) >= 5
  assert [f for f in files if b"the-value" in f.read_bytes()] == []
