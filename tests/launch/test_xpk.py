"""GKE: xpk's exact command lines, workloads that the cluster restarts, failures told in a line."""

import shlex
import subprocess

import pytest

from research import run as runs

CLUSTER = ("--cluster=pod", "--zone=us-east5-a", "--project=mine")
JOB = ("--", "--config=experiments/kvshift/configs/induction.py:tiny", "--config.only=plain-1")
RUN = ("run", *CLUSTER, "--topology=tpu7x:2x2x2", "--name=run-1", "--workdir=gs://b/x", "--retries=2", "--poll=0.01")
CANARY = "-".join(["canary"] * 3)


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (["create", *CLUSTER], ["--topology"]),
    (["create", *CLUSTER, "--topology=v6e:4x4x4"], ["two dimensions"]),
    (["create", "--cluster=Pod", "--topology=v6e:4x4"], ["cluster=Pod"]),
    (["run", *CLUSTER, "--topology=v6e:4x4", f"--name={'n' * 41}", "--workdir=gs://b/x", *JOB], ["at most 40"]),
    (["run", *CLUSTER, "--topology=v6e:4x4", "--name=n", "--workdir=runs/x", *JOB], ["workdir=runs/x"]),
    ([*RUN, f"--env=A={CANARY}", *JOB], ["env=(not shown)"]),
    ([*RUN, *JOB, "--config.steps=0"], ["steps=0"]),
    (["logs", *CLUSTER], ["--name"]),
  ],
  ids=lambda x: " ".join(x)[:60],
)
def test_a_mistake_is_one_line_and_calls_nothing(tools, arguments, says):
  done = tools.here("launch.xpk", *arguments)
  assert done.returncode == runs.EXIT_USER
  assert done.stderr.count("\n") == 1, done.stderr
  assert all(part in done.stderr for part in says), done.stderr
  assert CANARY not in done.stderr
  assert tools.calls() == []


def test_create_asks_for_slices(tools):
  done = tools.here(
    "launch.xpk", "create", *CLUSTER, "--topology=tpu7x:4x4x4", "--slices=2", "--spot", "--", "--private"
  )
  assert done.returncode == 0, done.stderr
  (call,) = tools.calls()
  assert call[:3] == ["xpk", "cluster", "create"]
  assert set(call[3:]) == {*CLUSTER, "--tpu-type=tpu7x-128", "--num-slices=2", "--spot", "--private", "--quiet"}


def test_a_run_is_submitted_waited_for_and_restarted_by_the_cluster(tools):
  done = tools.here("launch.xpk", *RUN, "--env=HF_TOKEN", *JOB, HF_TOKEN=CANARY)
  assert done.returncode == 0, done.stderr
  create, wait = tools.calls("xpk")
  assert create[:3] == ["xpk", "workload", "create"]
  options = {"--workload=run-1", "--tpu-type=tpu7x-16", "--num-slices=1", "--base-docker-image=python:3.12"}
  restarts = {"--max-restarts=2", "--restart-on-exit-codes=69,75", "--termination-grace-period-seconds=120", "--quiet"}
  assert {*CLUSTER, *options, *restarts} < set(create)
  code = next(a for a in create if a.startswith("--script-dir=")).removeprefix("--script-dir=")
  head = subprocess.run(["git", "-C", code, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
  assert head.strip() == tools.commit
  assert wait == ["xpk", "workload", "list", *CLUSTER[:1], CLUSTER[2], CLUSTER[1], "--wait-for-job-completion=run-1"]
  assert CANARY not in done.stdout + done.stderr + str(tools.calls())
  # What the container runs: it stops at once without its variable, else it becomes the run.
  shell = next(a for a in create if a.startswith("--command=")).removeprefix("--command=")
  bare = subprocess.run(["sh", "-c", shell], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)
  assert bare.returncode == 2
  assert bare.stdout.startswith("error: env=HF_TOKEN: not in the container")
  assert shlex.split(shell.partition("exec ")[2])[:3] == ["python", "-m", "experiments.kvshift"]


def test_dry_run_prints_the_exact_commands_and_runs_none(tools):
  done = tools.here("launch.xpk", *RUN, "--dry-run", *JOB)
  assert done.returncode == 0, done.stderr
  assert "xpk workload create --cluster=pod --project=mine --zone=us-east5-a --workload=run-1" in done.stdout
  for verb, more in {"create": ["--topology=v6e:4x4"], "status": [], "logs": ["--name=run-1"], "delete": []}.items():
    done = tools.here("launch.xpk", verb, *CLUSTER, *more, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("xpk ", "kubectl "))
  assert tools.calls() == []


@pytest.mark.parametrize(("xpk", "status", "told"), [(125, 1, "why is in its log"), (124, 75, "not done yet")])
def test_how_a_workload_ended_is_told(tools, xpk, status, told):
  tools.scenario([["--wait-for-job-completion"], 0, {"status": xpk}])
  done = tools.here("launch.xpk", *RUN, *JOB)
  assert done.returncode == status
  assert told in done.stderr


def test_a_workload_that_is_there_already_is_waited_for(tools):
  tools.scenario([["workload", "create"], 0, {"say": "[XPK] run-1 already exists", "status": 1}])
  done = tools.here("launch.xpk", *RUN, *JOB)
  assert done.returncode == 0, done.stderr
  assert "submitted before" in done.stderr


@pytest.mark.parametrize(
  ("said", "kind", "calls", "status"),
  [
    ("Insufficient quota to satisfy the request", "quota", 1, 2),
    ("GCE_STOCKOUT: the zone does not have enough resources", "no capacity", 3, 75),
    ("ERROR: (gcloud.auth) Reauthentication required", "not signed in", 1, 2),
  ],
)
def test_a_failure_is_one_line_with_its_fix(tools, said, kind, calls, status):
  tools.scenario([["xpk"], 0, {"say": said, "status": 1}])
  done = tools.here("launch.xpk", "create", *CLUSTER, "--topology=v6e:4x4", "--retries=2", "--poll=0.01")
  assert done.returncode == status
  assert done.stderr.splitlines()[-1].startswith(f"error: {kind}: ")
  assert len(tools.calls()) == calls


def test_delete_asks_for_the_name(tools):
  assert tools.here("launch.xpk", "delete", *CLUSTER, stdin="run-1\n").returncode == runs.EXIT_USER
  assert tools.here("launch.xpk", "delete", *CLUSTER, "--name=run-1", stdin="run-1\n").returncode == 0
  assert tools.here("launch.xpk", "delete", *CLUSTER, "--yes").returncode == 0
  assert [call[1:3] for call in tools.calls()] == [["workload", "delete"], ["cluster", "delete"]]
