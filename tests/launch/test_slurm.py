"""Slurm: the script that is submitted, jobs that requeue themselves until done, names and no values of variables."""

import json
import shlex
import sys

import pytest

from research import run as runs

JOB = ("--", "--config=experiments/kvshift/configs/induction.py:tiny", "--config.only=plain-1", "--config.seeds=0")
CANARY = "-".join(["canary"] * 3)


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (["submit", *JOB], ["--workdir"]),
    (["submit", "--workdir=", *JOB], ["workdir=''"]),
    (["submit", "--workdir=a b", *JOB], ["workdir=a b", "blanks"]),
    (["submit", "--workdir=x"], ["--config=FILE.py"]),
    (["submit", "--workdir=x", "--time=soon", *JOB], ["time=soon", "HH:MM:SS"]),
    (["submit", "--workdir=x", "--nodes=0", *JOB], ["--nodes", "0"]),
    (["submit", "--workdir=x", "--tasks=core", *JOB], ["gpu", "node"]),
    (["submit", "--workdir=x", f"--env=A={CANARY}", *JOB], ["env=(not shown)"]),
    (["submit", "--workdir=x", *JOB, "--config.steps=0"], ["steps=0"]),
    (["cancel"], ["--job"]),
    (["status", "--", "x"], ["nothing after it"]),
  ],
  ids=lambda x: " ".join(x)[:40],
)
def test_a_mistake_is_one_line_and_submits_nothing(tools, arguments, says):
  done = tools.here("launch.slurm", *arguments)
  assert done.returncode == runs.EXIT_USER
  assert done.stderr.count("\n") == 1, done.stderr
  assert all(part in done.stderr for part in says), done.stderr
  assert CANARY not in done.stderr
  assert tools.calls() == []


def test_dry_run_prints_the_script_and_the_command_and_leaves_nothing(tools, tmp_path):
  workdir = tmp_path / "run"
  options = ("--nodes=2", "--gpus-per-node=4", "--partition=h100", "--account=us", "--time=1-12:00:00")
  done = tools.run("launch.slurm", "submit", *options, f"--workdir={workdir}", "--dry-run", *JOB)
  assert done.returncode == 0, done.stderr
  assert tools.calls() == []
  assert not workdir.exists()
  script = "".join(line[2:] + "\n" for line in done.stdout.splitlines() if line.startswith("# "))
  for name, value in {
    "nodes": 2, "ntasks-per-node": 4, "gpus-per-node": 4, "partition": "h100", "account": "us", "time": "1-12:00:00"
  }.items():  # fmt: skip
    assert f"#SBATCH --{name}={value}\n" in script
  assert "#SBATCH --requeue\n" in script
  assert "#SBATCH --signal=TERM@120\n" in script
  run = shlex.split(next(line for line in script.splitlines() if line.startswith("srun")))
  assert run[:3] == ["srun", "--wait=180", "--export=ALL"]
  assert run[3:6] == [sys.executable, "-m", "experiments.kvshift"]
  assert run[-1] == f"--workdir={workdir}"
  last = shlex.split(done.stdout.splitlines()[-1])
  assert last == ["sbatch", "--parsable", "--export=HOME,PATH,USER,LD_LIBRARY_PATH", f"{workdir}/job.sh"]


def test_one_process_a_node_is_told_its_gpus(tools, tmp_path):
  done = tools.here(
    "launch.slurm", "submit", f"--workdir={tmp_path}", "--tasks=node", "--gpus-per-node=4", "--dry-run", *JOB
  )
  assert "#SBATCH --ntasks-per-node=1\n" in done.stdout
  assert "export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92\n" in done.stdout


@pytest.mark.slow
def test_a_job_that_is_interrupted_is_requeued_and_goes_on_and_no_secret_is_written(tools, tmp_path):
  """For real: the script trains, is told to save before its time limit, is requeued, and ends."""
  workdir = tmp_path / "run"
  saved = workdir / "checkpoints" / "plain-1-0"
  tools.scenario([["srun"], 1, {"signal": 15, "once": str(saved / "3")}])
  more = ("--config.steps=30", "--config.checkpoint.every=3", "--config.eval_every=0")
  passed = ("--env=JAX_PLATFORMS", "--env=REPRISE_CACHE", "--env=HF_TOKEN")
  secrets = {"WANDB_API_KEY": CANARY, "HF_TOKEN": CANARY}
  done = tools.run("launch.slurm", "submit", *passed, f"--workdir={workdir}", *JOB, *more, **secrets)
  assert done.returncode == 0, done.stderr
  assert f"job 41; log: {workdir}/slurm-41.log" in done.stdout
  assert len(tools.calls("scontrol requeue 41")) == 1
  log = (tools.folder / "job.log").read_text()
  assert "interrupted; saved at step" in log
  assert "going on from step" in log
  assert (saved / "30").is_dir()
  launches = json.loads((workdir / "manifest.json").read_text())["launches"]
  assert [launch["git"] for launch in launches] == [{"commit": tools.commit, "dirty": False}] * 2
  files = [f for f in (*workdir.rglob("*"), tools.folder / "job.log", tools.folder / "calls.jsonl") if f.is_file()]
  assert len(files) > 20
  assert [f for f in files if CANARY.encode() in f.read_bytes()] == []
  assert CANARY not in done.stdout + done.stderr


@pytest.mark.parametrize(
  ("status", "state", "requeued"), [(75, "RUNNING", 3), (69, "RUNNING", 3), (75, "COMPLETING", 0), (3, "RUNNING", 0)]
)
def test_only_a_running_job_that_may_go_on_is_requeued_and_not_for_ever(tools, tmp_path, status, state, requeued):
  tools.scenario([["srun"], 0, {"status": status}], [["squeue"], 0, {"say": state}])
  tools.here("launch.slurm", "submit", f"--workdir={tmp_path / 'run'}", "--retries=3", *JOB)
  assert len(tools.calls("scontrol requeue")) == requeued
  assert len(tools.calls("srun")) == requeued + 1


@pytest.mark.parametrize(
  ("said", "kind", "status"),
  [
    ("Invalid partition name specified", "refused by Slurm", 2),
    ("Socket timed out on send/recv operation", "the service is unwell", 75),
  ],
)
def test_a_refusal_is_one_line(tools, tmp_path, said, kind, status):
  tools.scenario([["sbatch"], 0, {"say": f"sbatch: error: Batch job submission failed: {said}", "status": 1}])
  done = tools.here("launch.slurm", "submit", f"--workdir={tmp_path / 'run'}", *JOB)
  assert done.returncode == status
  assert done.stderr.splitlines()[-1].startswith(f"error: {kind}: ")
  assert len(tools.calls("sbatch")) == 1


def test_status_and_cancel(tools):
  assert tools.here("launch.slurm", "status").returncode == 0
  assert tools.here("launch.slurm", "status", "--job=41").returncode == 0
  assert tools.here("launch.slurm", "cancel", "--job=41").returncode == 0
  assert tools.calls() == [["squeue", "--me", "--long"], ["squeue", "--jobs=41", "--long"], ["scancel", "41"]]
