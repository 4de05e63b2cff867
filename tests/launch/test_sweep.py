"""Sweeps: every combination in its own workdir, mistakes before anything runs, outcomes in a table."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from launch import sweep
from research import run as runs

CONFIG = "--config=experiments/kvshift/configs/induction.py:tiny"
SMALL = ("--config.only=plain-1", "--config.seeds=0", "--config.steps=4", "--config.eval_every=0")

CANARY = "-".join(["canary"] * 3)
SECRETS = dict.fromkeys(("WANDB_API_KEY", "HF_TOKEN", "GOOGLE_OAUTH_ACCESS_TOKEN", "UNKNOWN"), CANARY)


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    ([CONFIG], ["--grid"]),
    ([CONFIG, "--grid", "tx.lr"], ["grid=tx.lr", "NAME=VALUE"]),
    ([CONFIG, "--grid", "tx.lr=1e-3,1e-3"], ["each value once"]),
    ([CONFIG, "--grid", "tx.lr=1e-3,"], ["none empty"]),
    ([CONFIG, "--grid", "tx.lr=1", "--grid", "tx.lr=2"], ["each field once"]),
    ([CONFIG, "--grid", "tx.lrr=1,2"], ["tx.lrr=1", "did you mean tx.lr?"]),
    ([CONFIG, "--grid", "tx.lr=1e-3,-1"], ["tx.lr=-1"]),
    ([CONFIG, "--grid", "tx.lr=1,2", "--on=mars"], ["mars", "slurm"]),
    ([CONFIG, "--grid", "tx.lr=1,2", "--", "--nodes=1"], ["--on"]),
  ],
  ids=lambda x: " ".join(x)[-40:],
)
def test_a_mistake_is_one_line_and_runs_nothing(tools, tmp_path, arguments, says):
  done = tools.here("launch.sweep", f"--workdir={tmp_path}", *arguments)
  assert done.returncode == runs.EXIT_USER
  assert done.stderr.count("\n") == 1, done.stderr
  assert all(part in done.stderr for part in says), done.stderr
  assert list(tmp_path.iterdir()) == []


def test_the_grid_is_the_product_in_the_order_given():
  points = sweep.grid(["tx.lr=1e-3,1e-2", "seeds=0,1"])
  assert [sweep.directory(point) for point in points] == [
    "tx.lr=1e-3,seeds=0",
    "tx.lr=1e-3,seeds=1",
    "tx.lr=1e-2,seeds=0",
    "tx.lr=1e-2,seeds=1",
  ]
  assert sweep.directory(("data.source=files:/a/b",)) == "data.source=files__a_b"


def test_dry_run_prints_every_command_and_runs_none(tools, tmp_path):
  grid = ("--grid", "tx.lr=1e-3,1e-2", "--grid", "seeds=0,1")
  done = tools.here("launch.sweep", CONFIG, *grid, "--config.steps=4", f"--workdir={tmp_path}", "--dry-run")
  assert done.returncode == 0, done.stderr
  commands = [line for line in done.stdout.splitlines() if line.startswith(sys.executable)]
  assert len(commands) == 4
  assert "--config.steps=4 --config.tx.lr=1e-2 --config.seeds=0" in commands[2]
  assert shlex.split(commands[2])[-1] == f"--workdir={tmp_path}/tx.lr=1e-2,seeds=0"
  assert list(tmp_path.iterdir()) == []


def rows(text: str) -> list[list[str]]:
  return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")][-2:]


def test_runs_here_one_after_another_and_tells_how_each_ended_and_writes_no_secret(tools, tmp_path):
  # The second one wants devices that are not there, which only the run itself can see.
  grid = ("--grid", "mesh.data=-1,3")
  done = tools.run("launch.sweep", CONFIG, *SMALL, *grid, f"--workdir={tmp_path}", JAX_NUM_CPU_DEVICES="1", **SECRETS)
  assert done.returncode == runs.EXIT_USER
  good, bad = rows(done.stdout)
  assert good[:3] == ["mesh.data=-1", "0", "done"]
  assert bad[:3] == ["mesh.data=3", "2", "a mistake in the command or the config"]
  assert (tmp_path / "mesh.data=-1" / "checkpoints" / "plain-1-0" / "4").is_dir()
  assert "needs 3 devices and there are 1" in done.stderr
  files = [f for f in tmp_path.rglob("*") if f.is_file()]
  assert {"manifest.json", "metrics.jsonl", "results.json", "data.json"} <= {f.name for f in files}
  assert [f for f in files if CANARY.encode() in f.read_bytes()] == []
  assert CANARY not in done.stdout + done.stderr


def test_submits_through_a_launcher(tools, tmp_path):
  grid = ("--grid", "tx.lr=1e-3,1e-2")
  tools.scenario([["sbatch"], 1, {"say": "41"}], [["sbatch"], 2, {"say": "Invalid account", "status": 1}])
  there = ("--on=slurm", "--", "--nodes=1", "--gpus-per-node=2")
  done = tools.here("launch.sweep", CONFIG, *SMALL, *grid, f"--workdir={tmp_path}", *there)
  first, second = rows(done.stdout)
  assert first[:3] == ["tx.lr=1e-3", "0", "submitted"]
  assert second[:2] == ["tx.lr=1e-2", "2"]
  assert done.returncode == 2
  assert [call[-1] for call in tools.calls("sbatch")] == [f"{tmp_path}/tx.lr=1e-{i}/job.sh" for i in (3, 2)]
  script = (tmp_path / "tx.lr=1e-3" / "job.sh").read_text()
  assert "--config.tx.lr=1e-3" in script
  assert "#SBATCH --gpus-per-node=2\n" in script


def test_every_workload_of_gke_has_a_name_of_its_own_and_keeps_it(tools):
  there = ("--workdir=gs://bucket/My sweep", "--on=xpk", "--", "--cluster=pod", "--topology=v6e:4x4")
  for values in ("1e-3,1e-2", "1e-2,1e-4"):
    done = tools.here("launch.sweep", CONFIG, "--grid", f"tx.lr={values}", *there)
    assert done.returncode == 0, done.stderr
  names = [next(a for a in call if a.startswith("--workload=")) for call in tools.calls("xpk workload create")]
  assert [name[: len("--workload=sweep-my-sweep-")] for name in names] == ["--workload=sweep-my-sweep-"] * 4
  assert names[1] == names[2]
  assert len(set(names)) == 3
  assert tools.calls("--wait-for-job-completion") == []


def test_runs_on_a_pod_one_after_another(tools):
  tools.scenario([["worker.sh", " -- "], 0, {"say": "reprise: w0 ended with 0"}], node="READY")
  there = ("--workdir=/shared/sweep", "--on=tpu_vm", "--", "--name=pod", "--zone=us-west4-a")
  done = tools.here("launch.sweep", CONFIG, "--grid", "tx.lr=1e-3,1e-2", *there)
  assert done.returncode == 0, done.stderr
  assert [row[:3] for row in rows(done.stdout)] == [["tx.lr=1e-3", "0", "done"], ["tx.lr=1e-2", "0", "done"]]
  assert len(tools.calls(" -- ", "--workdir=/shared/sweep/tx.lr=1e-2")) == 1


@pytest.mark.slow
def test_what_is_interrupted_is_run_again_and_what_is_complete_is_not(tools, tmp_path):
  more = ("--config.steps=60", "--config.checkpoint.every=5")
  arguments = ["-m", "launch.sweep", CONFIG, *SMALL, *more, "--grid", "tx.lr=1e-3,1e-2", f"--workdir={tmp_path}"]
  command = [sys.executable, *arguments, "--poll=0.1"]
  process = subprocess.Popen(command, cwd=tools.checkout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  saved = tmp_path / "tx.lr=1e-3" / "checkpoints" / "plain-1-0" / "5"
  while not saved.exists():
    time.sleep(0.05)
  children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
  for pid in children:
    os.kill(int(pid), signal.SIGTERM)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  assert "interrupted after saving" in err
  assert [row[1] for row in rows(out)] == ["0", "0"]
  before = (tmp_path / "tx.lr=1e-3" / "manifest.json").read_text()
  assert len(json.loads(before)["launches"]) == 2
  assert subprocess.run(command, cwd=tools.checkout, capture_output=True, check=False).returncode == 0
  assert (tmp_path / "tx.lr=1e-3" / "manifest.json").read_text() == before
