"""A killed run that is started again ends as if nothing had happened, bit for bit. Real processes, real signals."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from research import run, writers
from tests.processes import RUN, TIMES

STEPS, EVERY = 30, 4
COMMAND = [
  sys.executable,
  "-m",
  "experiments.kvshift",
  "--config=experiments/kvshift/configs/main.py:tiny",
  "--config.only=kvshift",
  "--config.seeds=0",
  f"--config.steps={STEPS}",
  f"--config.checkpoint.every={EVERY}",
  "--config.checkpoint.keep_last=3",
  "--config.eval_every=10",
  "--config.log_every=1",
  "--config.accumulate=1",
]


def start(workdir, *arguments, devices=1):
  # Hold the step to 50 ms or so by writing every step; the runs are short, the kills must land inside them.
  env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
  command = [*COMMAND, f"--workdir={workdir}", *arguments]
  return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(workdir, *arguments, devices=1, status=0):
  process = start(workdir, *arguments, devices=devices)
  _, told = process.communicate(timeout=300)
  assert process.returncode == status, told
  return told


def history(workdir):
  """All that the run logged, less how long things took."""
  records = writers.read(workdir / "metrics.jsonl")
  return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def arrays(workdir, step=STEPS):
  """The saved hash of every array of the state at `step`."""
  return json.loads((workdir / RUN / str(step) / "record" / "data.json").read_text())["content"]["arrays"]


def steps(workdir):
  return sorted(int(p.name) for p in (workdir / RUN).glob("*") if p.name.isdecimal())


def same(workdir, other):
  assert history(workdir) == history(other)
  assert arrays(workdir) == arrays(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that nothing interrupted."""
  workdir = tmp_path_factory.mktemp("whole")
  finish(workdir)
  assert len([r for r in history(workdir) if r["kind"] == "train"]) == STEPS
  assert steps(workdir) == [24, 28, 30]
  return workdir


def kill_when(workdir, ready):
  """Starts the run and SIGKILLs it once `ready()`; returns whether it was still running."""
  process = start(workdir)
  try:
    while process.poll() is None and not ready():
      time.sleep(0.0005)
    alive = process.poll() is None
  finally:
    process.kill()
    process.wait()
  return alive


def logged(workdir):
  path = workdir / "metrics.jsonl"
  return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at_random_moments(workdir, kills, seed):
  """Kills as many launches, each at a random line that this launch logs; returns how many it hit alive."""
  rng = random.Random(seed)
  hit = 0
  for i in range(kills):
    before = max(steps(workdir), default=0)
    # later and later, so that every launch can get there: (i / kills) of the way and a random bit more
    lines = before + 2 + rng.randrange(1 + (STEPS - before) // (kills - i + 1))
    pause = rng.uniform(0, 0.02)
    launched = time.time()

    def ready(lines=lines, launched=launched, pause=pause):
      path = workdir / "metrics.jsonl"
      if not path.exists() or path.stat().st_mtime < launched or logged(workdir) < lines:
        return False
      time.sleep(pause)
      return True

    hit += kill_when(workdir, ready)
  return hit


def test_killed_at_random_moments_it_ends_the_same(whole, tmp_path):
  assert kill_at_random_moments(tmp_path, kills=3, seed=time.time_ns()) >= 2
  finish(tmp_path)
  same(tmp_path, whole)


def test_killed_in_the_middle_of_a_save_it_ends_the_same(whole, tmp_path):
  saving = lambda: any("tmp" in p.name for p in (tmp_path / RUN).glob("*"))
  assert kill_when(tmp_path, saving)
  finish(tmp_path)
  same(tmp_path, whole)


@pytest.mark.slow
def test_killed_fifty_times_it_ends_the_same(whole, tmp_path):
  hit = 0
  for seed in range(10):
    workdir = tmp_path / str(seed)
    hit += kill_at_random_moments(workdir, kills=5, seed=seed)
    finish(workdir)
    same(workdir, whole)
  assert hit >= 35


@pytest.mark.slow
def test_killed_at_any_time_after_its_start_it_ends_the_same(whole, tmp_path):
  rng = random.Random(0)
  for _ in range(20):  # imports, compiles, restores, the report: whatever is going on then
    end = time.time() + rng.uniform(0.5, 6)
    kill_when(tmp_path, lambda end=end: time.time() > end)
  finish(tmp_path)
  same(tmp_path, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_saves_and_leaves_with_the_status_for_try_again(whole, tmp_path, number):
  process = start(tmp_path)
  while logged(tmp_path) < 7:
    assert process.poll() is None
    time.sleep(0.001)
  process.send_signal(number)
  _, told = process.communicate(timeout=120)
  assert process.returncode == run.EXIT_INTERRUPTED == 75
  assert "Traceback" not in told
  saved = steps(tmp_path)[-1]
  assert f"saved at step {saved}" in told.splitlines()[-1]
  assert 5 <= saved < STEPS
  told = finish(tmp_path)
  assert f"going on from step {saved}" in told
  same(tmp_path, whole)


def damage_flip(step_dir):
  """Flips one bit in the middle of the largest file, which holds the arrays."""
  file = max((p for p in step_dir.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def damage_truncate(step_dir):
  for file in step_dir.rglob("*"):
    if file.is_file():
      os.truncate(file, file.stat().st_size // 2)


def damage_remove(step_dir):
  shutil.rmtree(step_dir / "arrays")


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_remove], ids=lambda f: f.__name__)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used(whole, tmp_path, damage):
  shutil.copytree(whole, tmp_path / "run")
  workdir = tmp_path / "run"
  damage(workdir / RUN / "30")
  told = finish(workdir)
  assert "step 30 is damaged" in told
  assert "using step 28" in told
  assert "Traceback" not in told
  same(workdir, whole)
  assert (workdir / RUN / "30.damaged").is_dir()  # set aside, not deleted
  assert {28, 30} <= set(steps(workdir))


def test_with_every_checkpoint_damaged_it_stops_and_says_so(whole, tmp_path):
  shutil.copytree(whole, tmp_path / "run")
  for step in (24, 28, 30):
    damage_flip(tmp_path / "run" / RUN / str(step))
  told = finish(tmp_path / "run", status=2)
  assert "every step that could be used is damaged" in told.splitlines()[-1]
  assert steps(tmp_path / "run") == [24, 28, 30]


def test_it_goes_on_on_another_mesh(whole, tmp_path):
  shutil.copytree(whole, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / RUN / "30")
  finish(tmp_path / "run", "--config.mesh.model=2", devices=4)
  for ours, theirs in zip(history(tmp_path / "run"), history(whole), strict=True):
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_another_config_in_the_same_workdir_is_refused_and_nothing_is_lost(whole):
  before = history(whole)
  told = finish(whole, "--config.tx.lr=1e-4", status=2)
  assert told.count("\n") == 1
  assert "tx.lr=0.0001 (was 0.003)" in told
  assert history(whole) == before


def test_a_run_goes_on_from_another_workdir(whole, tmp_path):
  shutil.copytree(whole / RUN, tmp_path / "old" / RUN)
  shutil.rmtree(tmp_path / "old" / RUN / "30")
  finish(tmp_path / "new", f"--config.resume={tmp_path / 'old'}")
  assert arrays(tmp_path / "new") == arrays(whole)
  assert steps(tmp_path / "old") == [24, 28]


def test_a_run_starts_from_another_runs_parameters(whole, tmp_path):
  finish(tmp_path, f"--config.init_from={whole}", "--config.tx.name=muon")
  evals = lambda workdir: [r["loss"] for r in history(workdir) if r["kind"] == "eval"]
  assert evals(tmp_path)[0] == evals(whole)[-1]


def test_an_arm_starts_where_an_earlier_one_with_its_seed_ended(tmp_path):
  spec = tmp_path / "stages.py"
  spec.write_text(
    "from experiments.kvshift.configs import main\n"
    "def get_config(arg=None):\n"
    "  c = main.get_config('tiny')\n"
    "  c.arms = (('first', 'attention=plain'), ('second', 'attention=plain', 'init_from=arm:first'))\n"
    "  c.seeds, c.eval_every, c.steps = (0, 1), 6, 6\n"
    "  return c\n"
  )
  command = [sys.executable, "-m", "experiments.kvshift", f"--config={spec}", f"--workdir={tmp_path / 'run'}"]
  subprocess.run(command, check=True, capture_output=True, timeout=300)
  evals = {(r["arm"], r["seed"], r["step"]): r["loss"] for r in history(tmp_path / "run") if r["kind"] == "eval"}
  for seed in (0, 1):
    assert evals["second", seed, 0] == evals["first", seed, 6]
  alone = [*command[:-1], f"--workdir={tmp_path / 'alone'}", "--config.only=second"]
  told = subprocess.run(alone, capture_output=True, text=True, timeout=300)
  assert told.returncode == 2
  assert "arm=first: has no checkpoint in" in told.stderr.splitlines()[-1]
  turned = spec.read_text().replace("arm:first", "arm:second")
  spec.write_text(turned)
  told = subprocess.run([*command[:-1], f"--workdir={tmp_path / 'b'}"], capture_output=True, text=True, timeout=300)
  assert told.returncode == 2
  assert "init_from=arm:second: no arm of that name before second; there are first" in told.stderr.splitlines()[-1]


def test_a_loss_that_is_not_finite_stops_with_its_step_and_keeps_the_last_good_checkpoint(tmp_path):
  told = finish(tmp_path, "--config.tx.lr=1e18", "--config.tx.clip=0", "--config.checkpoint.every=1", status=3)
  last = told.splitlines()[-1]
  assert last.startswith("error: loss, gradients or update are not finite at step ")
  assert "Traceback" not in told
  bad = next(r["step"] for r in history(tmp_path) if None in r.values())
  assert f"at step {bad};" in last
  kept = steps(tmp_path)
  assert all(step < bad for step in kept)
  assert (f"the last good checkpoint is step {kept[-1]}" if kept else "no checkpoint was saved before it") in last


def test_a_full_disk_is_told_in_the_last_line_and_the_run_goes_on_once_there_is_room(whole, tmp_path):
  limited = ["bash", "-c", 'ulimit -f 300; exec "$@"', "x", *COMMAND, f"--workdir={tmp_path}"]
  env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}
  done = subprocess.run(limited, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == run.EXIT_SAVE == 74, done.stderr
  assert done.stderr.splitlines()[-1].startswith("error: step 4 was not saved in ")
  finish(tmp_path)
  same(tmp_path, whole)


def test_two_runs_cannot_write_one_workdir(tmp_path):
  first = start(tmp_path)
  try:
    while logged(tmp_path) < 1:
      assert first.poll() is None
      time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)  # still there, however slow the second one starts
    told = finish(tmp_path, status=2)
    assert "another run is writing there" in told
  finally:
    first.kill()
    first.wait()
