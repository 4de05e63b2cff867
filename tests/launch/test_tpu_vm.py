"""TPU VMs: gcloud's exact command lines, preempted runs that go on, failures told in a line, secrets kept."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

from launch import tpu_vm
from research import run as runs
from research import writers

POD = ("--name=pod", "--zone=us-west4-a")
JOB = ("--", "--config=experiments/kvshift/configs/induction.py:tiny", "--config.only=plain-1", "--config.seeds=0")
QUICK = ("--poll=0.01", "--retries=2")
CANARY = "-".join(["canary"] * 3)  # the tests themselves are copied to the workers


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    ([], ["create|run|logs|status|stop|delete", "required"]),
    (["crate", *POD], ["crate", "invalid choice"]),
    (["status", *POD, "--whence=now"], ["--whence=now"]),
    (["status", "--name=pod"], ["--zone"]),
    (["status", "--name=Pod", "--zone=us-west4-a"], ["name=Pod", "lowercase"]),
    (["status", "--name=pod", "--zone=us-west4"], ["zone=us-west4", "us-west4-a"]),
    (["status", *POD, "--", "--more"], ["nothing after it"]),
    (["create", *POD], ["--topology"]),
    (["create", *POD, "--topology=v5e"], ["topology=v5e", "two dimensions", "v5e:4x4"]),
    (["create", *POD, "--topology=v5e:4x4x4"], ["two dimensions"]),
    (["create", *POD, "--topology=v5e:3x3"], ["topology=v5e:3x3", "8x16"]),
    (["create", *POD, "--topology=v5p:4x4x2"], ["topology=v5p:4x4x2", "4x4x8"]),
    (["create", *POD, "--topology=h100:8"], ["topology=h100:8", "v5e", "tpu7x"]),
    (["create", *POD, "--topology=tpu7x:2x2x2"], ["tpu7x:2x2x2", "launch.xpk"]),
    (["create", *POD, "--topology=v5e:4x4", "--retries=-1"], ["--retries", "-1"]),
    (["run", *POD, "--workdir=gs://b/x"], ["--config=FILE.py"]),
    (["run", *POD, "--workdir=runs/x", *JOB], ["workdir=runs/x", "gs://"]),
    (["run", *POD, "--workdir=", *JOB], ["workdir=''"]),
    (["run", *POD, "--workdir=gs://b/x", *JOB, "--config.tx.lrr=1"], ["tx.lrr=1", "did you mean tx.lr?"]),
    (["run", *POD, "--workdir=gs://b/x", "--", "--config=nowhere.py"], ["config=nowhere.py"]),
    (["run", *POD, "--workdir=gs://b/x", "--topology=v5e:9", *JOB], ["topology=v5e:9"]),
  ],
  ids=lambda x: " ".join(x)[-50:] if x else "nothing",
)
def test_a_mistake_is_one_line_and_calls_nothing(tools, arguments, says):
  done = tools.here("launch.tpu_vm", *arguments)
  assert done.returncode == runs.EXIT_USER
  assert done.stderr.startswith("error: ")
  assert done.stderr.count("\n") == 1, done.stderr
  assert all(part in done.stderr for part in says), done.stderr
  assert tools.calls() == []


@pytest.mark.parametrize(
  "flag", ["--workdir=https://me:SECRET@host/x", "--workdir=gs://b/x?token=SECRET", "--env=KEY=SECRET"]
)
def test_a_secret_on_the_command_line_is_refused_and_not_shown(tools, flag):
  done = tools.here("launch.tpu_vm", "run", *POD, flag.replace("SECRET", CANARY), "--workdir=gs://b/x", *JOB)
  assert done.returncode == runs.EXIT_USER
  assert done.stderr.count("\n") == 1
  assert CANARY not in done.stderr + done.stdout
  assert tools.calls() == []


def test_the_value_of_a_secret_variable_is_refused_wherever_it_stands(tools):
  name = f"--name={CANARY}"
  done = tools.here("launch.tpu_vm", "status", name, "--zone=us-west4-a", WANDB_API_KEY=CANARY)
  assert done.returncode == runs.EXIT_USER
  assert CANARY not in done.stderr + done.stdout
  assert tools.calls() == []


def test_every_command_explains_itself(tools):
  for verb in ("create", "run", "logs", "status", "stop", "delete"):
    done = tools.here("launch.tpu_vm", verb, "--help")
    assert done.returncode == 0
    assert "--dry-run" in done.stdout
    assert "--zone" in done.stdout


@pytest.mark.parametrize(
  ("topology", "flags"),
  [
    ("v5e:4x4", ["--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"]),
    ("v6e:16x16", ["--accelerator-type=v6e-256", "--version=v2-alpha-tpuv6e"]),
    ("v4:2x2x4", ["--accelerator-type=v4-32", "--version=tpu-ubuntu2204-base"]),
    ("v4:4x8x8", ["--type=v4", "--topology=4x8x8", "--version=tpu-ubuntu2204-base"]),
    ("v5p:4x4x8", ["--accelerator-type=v5p-256", "--version=v2-alpha-tpuv5"]),
    ("v5p:8x8x8", ["--type=v5p", "--topology=8x8x8", "--version=v2-alpha-tpuv5"]),
  ],
)
def test_create_asks_for_the_topology(tools, topology, flags):
  done = tools.here("launch.tpu_vm", "create", *POD, f"--topology={topology}", "--", "--network=own")
  assert done.returncode == 0, done.stderr
  (call,) = tools.calls("tpu-vm create")
  assert ("alpha" in call) == (topology == "v5p:8x8x8")
  call = [word for word in call if word != "alpha"]
  assert call[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "pod"]
  assert {"--zone=us-west4-a", "--network=own", "--quiet", *flags} == set(call[6:])


def test_accelerator_types_count_what_their_generation_counts():
  assert tpu_vm.parse_topology("v5e:4x4")[2] == "v5litepod-16"
  assert tpu_vm.parse_topology("v5p:2x2x2")[2] == "v5p-16"
  assert tpu_vm.parse_topology("tpu7x:4x4x4")[2] == "tpu7x-128"


def test_a_queued_spot_pod_is_waited_for(tools):
  # The request is made; its node comes at the third look.
  wait, come = (
    {"set": {"queued": "WAITING_FOR_RESOURCES"}},
    {"say": "ACTIVE", "set": {"queued": "ACTIVE", "node": "READY"}},
  )
  tools.scenario([["create"], 1, wait], [["queued-resources", "describe"], 3, come])
  done = tools.here("launch.tpu_vm", "create", *POD, "--topology=v6e:4x4", "--spot", "--queued", *QUICK)
  assert done.returncode == 0, done.stderr
  (call,) = tools.calls("queued-resources create")
  assert {"--node-id=pod", "--spot", "--runtime-version=v2-alpha-tpuv6e", "--accelerator-type=v6e-16"} <= set(call)
  assert "request WAITING_FOR_RESOURCES; waiting" in done.stderr
  assert len(tools.calls("queued-resources describe")) == 3


def test_dry_run_prints_the_exact_commands_and_runs_none(tools):
  workdir = "gs://bucket/a b"
  asked = ("run", *POD, "--topology=v5e:4x4", "--queued", "--env=HF_TOKEN", f"--workdir={workdir}", "--dry-run", *JOB)
  done = tools.run("launch.tpu_vm", *asked, HF_TOKEN=CANARY)
  assert done.returncode == 0, done.stderr
  assert tools.calls() == []
  lines = [shlex.split(line, comments=True) for line in done.stdout.splitlines()]
  by_verb = {" ".join(line[3:5]): line for line in lines if line[:1] == ["gcloud"]}
  assert list(by_verb) == [
    "queued-resources describe",
    "tpu-vm describe",
    "queued-resources create",
    "tpu-vm scp",
    "tpu-vm ssh",
  ]
  remote = next(a for a in by_verb["tpu-vm ssh"] if a.startswith("--command="))
  run = shlex.split(remote.removeprefix("--command="))
  assert run[:4] == ["bash", f"reprise/{tools.commit[:12]}/launch/worker.sh", "start", "pod"]
  assert run[5:9] == ["HF_TOKEN", "--", "-m", "experiments.kvshift"]
  assert f"--workdir={workdir}" in run
  assert CANARY not in done.stdout + done.stderr
  for verb in ("create", "logs", "status", "stop", "delete"):
    more = ["--topology=v5e:4x4"] if verb == "create" else []
    assert "gcloud compute tpus" in tools.here("launch.tpu_vm", verb, *POD, *more, "--dry-run").stdout
  assert tools.calls() == []


def test_a_preempted_run_goes_on_to_its_end_and_no_secret_is_written(tools, tmp_path):
  """For real: the worker trains, is told to stop as the pod is taken away, and the pod is made anew."""
  workdir = tmp_path / "workdir"
  steps = workdir / "checkpoints" / "plain-1-0"
  lost = {"queued": "SUSPENDED", "node": "PREEMPTED"}
  tools.scenario([["worker.sh", " -- "], 1, {"signal": 15, "once": str(steps / "5"), "status": 255, "set": lost}])
  more = ("--config.steps=60", "--config.checkpoint.every=5", "--config.eval_every=0", "--config.log_every=1")
  asked = ("run", *POD, "--topology=v5e:4x4", "--spot", "--queued", "--poll=0.01", f"--workdir={workdir}", *JOB, *more)
  done = tools.run("launch.tpu_vm", *asked, WANDB_API_KEY=CANARY, HF_TOKEN=CANARY)
  assert done.returncode == 0, done.stderr
  assert "ended with 75" in done.stdout
  assert "node PREEMPTED; it is requested now" in done.stderr
  assert len(tools.calls("queued-resources create")) == 2
  assert len(tools.calls("queued-resources delete", "--force")) == 1
  # a new pod has nothing: the code is there again, at the commit
  assert len(tools.calls("tpu-vm scp")) == 2
  launches = json.loads((workdir / "manifest.json").read_text())["launches"]
  assert [launch["git"] for launch in launches] == [{"commit": tools.commit, "dirty": False}] * 2
  logged = [r["step"] for r in writers.read(workdir / "metrics.jsonl") if r["kind"] == "train"]
  assert sorted(set(logged)) == list(range(60))
  assert (steps / "60").is_dir()
  assert CANARY not in done.stdout + done.stderr
  places = [workdir, *tools.folder.glob("worker*"), tools.folder / "calls.jsonl"]
  assert files_with(CANARY, places) == []


def files_with(text: str, places: list[pathlib.Path]) -> list[pathlib.Path]:
  files = [f for p in places for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file()]
  assert len(files) > 20
  return [f for f in files if text.encode() in f.read_bytes()]


@pytest.mark.parametrize(
  ("status", "told"), [(2, "a mistake"), (3, "not finite"), (74, "could not be written"), (1, "failed")]
)
def test_any_other_status_of_the_run_is_final(tools, status, told):
  said = f"reprise: w0 ended with 0\nreprise: w1 ended with {status}"
  tools.scenario([["worker.sh", " -- "], 0, {"say": said, "status": status}], node="READY")
  done = tools.here("launch.tpu_vm", "run", *POD, "--workdir=/shared/x", *QUICK, *JOB)
  assert done.returncode == status
  assert told in done.stderr
  assert len(tools.calls(" -- ")) == 1


def test_a_run_that_was_stopped_by_hand_is_not_started_again(tools):
  tools.scenario([["worker.sh", " -- "], 0, {"say": "reprise: w0 ended with 130", "status": 130}], node="READY")
  done = tools.here("launch.tpu_vm", "run", *POD, "--workdir=/shared/x", *QUICK, *JOB)
  assert done.returncode == runs.EXIT_INTERRUPTED
  assert len(tools.calls(" -- ")) == 1


@pytest.mark.parametrize("status", [69, 75])
def test_a_run_that_is_always_interrupted_is_given_up_after_its_retries(tools, status):
  again = {"say": f"reprise: w0 ended with {status}\nreprise: w1 ended with 1", "status": 1}
  tools.scenario([["worker.sh", " -- "], 0, again], node="READY")
  done = tools.here("launch.tpu_vm", "run", *POD, "--workdir=/shared/x", *QUICK, *JOB)
  assert done.returncode == runs.EXIT_INTERRUPTED
  assert "gave up after 2 more attempts" in done.stderr
  tries = [re.search(r"worker.sh (\w+) pod (\S+)", " ".join(call)).groups() for call in tools.calls(" -- ")]
  assert [verb for verb, _ in tries] == ["start", "again", "again"]
  assert len({token for _, token in tries}) == 3


def test_a_worker_that_does_not_answer_is_asked_again_about_the_same_try(tools):
  silent = {
    "say": "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255].",
    "status": 255,
  }
  good = {"say": "reprise: w0 ended with 0"}
  tools.scenario([["worker.sh", " -- "], 1, silent], [["worker.sh", " -- "], 2, good], node="READY")
  done = tools.here("launch.tpu_vm", "run", *POD, "--workdir=/shared/x", *QUICK, *JOB)
  assert done.returncode == 0, done.stderr
  assert "a worker does not answer" in done.stderr
  first, second = (next(a for a in call if " -- " in a) for call in tools.calls(" -- "))
  assert first == second


def test_a_preempted_pod_is_told_when_nothing_says_how_to_make_it(tools):
  tools.scenario(node="PREEMPTED")
  done = tools.here("launch.tpu_vm", "run", *POD, "--workdir=/shared/x", *QUICK, *JOB)
  assert done.returncode == runs.EXIT_USER
  assert "preempted" in done.stderr
  assert "--topology" in done.stderr


# What the vendor's tool says, as quoted in its documentation and issue trackers.
FAILURES = [
  ("Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerRegionForTPUAPI' has been exceeded. Limit: 0", "quota", 1, 2),
  ('There is no more capacity in the zone "us-west4-a"; you can try in another zone', "no capacity", 3, 75),
  ("ERROR: (gcloud) You do not currently have an active account selected.", "not signed in", 1, 2),
  ("ERROR: (gcloud) PERMISSION_DENIED: Cloud TPU API has not been used in project 1", "not allowed", 1, 2),
  ("ERROR: (gcloud) ALREADY_EXISTS: Resource already exists", "exists already", 1, 2),
  ("ERROR: (gcloud) UNAVAILABLE: try again", "the service is unwell", 3, 75),
  ("ERROR: SSH Key is not present in the SSH agent. Please run ssh-add", "key not in the agent", 1, 2),
  ("ERROR: This TPU is going through a maintenance event, and is currently unavailable.", "under maintenance", 3, 75),
  ("ERROR: something new", "gcloud failed with status 1", 1, 2),
]


@pytest.mark.parametrize(("said", "kind", "calls", "status"), FAILURES, ids=lambda x: str(x)[:20])
def test_a_failure_is_one_line_with_its_fix_and_retried_if_that_can_help(tools, said, kind, calls, status):
  tools.scenario([["create"], 0, {"say": said, "status": 1}])
  done = tools.here("launch.tpu_vm", "create", *POD, "--topology=v5e:4x4", *QUICK)
  assert done.returncode == status
  assert len(tools.calls("create")) == calls
  last = done.stderr.splitlines()[-1]
  assert last.startswith(f"error: {kind}")
  assert "; " in last
  assert len(done.stderr.splitlines()) == calls  # one for each pause, and the last


def test_capacity_that_comes_is_taken(tools):
  tools.scenario([["create"], 1, {"say": "no more capacity in the zone", "status": 1}])
  done = tools.here("launch.tpu_vm", "create", *POD, "--topology=v5e:4x4", *QUICK)
  assert done.returncode == 0, done.stderr
  assert tools.state() == {"node": "READY"}


def test_a_tool_that_hangs_is_ended_and_told(tools):
  tools.scenario([["create"], 0, {"hang": 60}])
  done = tools.here("launch.tpu_vm", "create", *POD, "--topology=v5e:4x4", "--timeout=0.5", "--retries=0")
  assert done.returncode == runs.EXIT_INTERRUPTED
  assert done.stderr.startswith("error: gcloud does not answer: no end after 0.5 s")


def test_a_tool_that_is_not_installed_is_told(tools):
  done = tools.here("launch.tpu_vm", "create", *POD, "--topology=v5e:4x4", PATH="/nowhere")
  assert done.returncode == runs.EXIT_USER
  assert done.stderr.startswith("error: gcloud is not installed; install the Google Cloud CLI")
  assert done.stderr.count("\n") == 1


def test_what_is_not_committed_is_not_launched(tools):
  file = tools.checkout / "research" / "errors.py"
  before = file.read_text()
  try:
    file.write_text(before + "# changed\n")
    done = tools.here("launch.tpu_vm", "run", *POD, "--workdir=/shared/x", *JOB)
  finally:
    file.write_text(before)
  assert done.returncode == runs.EXIT_USER
  assert "research/errors.py: commit it" in done.stderr
  assert tools.calls() == []


def test_delete_asks_for_the_name(tools):
  tools.scenario(node="READY")
  assert tools.here("launch.tpu_vm", "delete", *POD, stdin="no\n").returncode == runs.EXIT_USER
  assert tools.here("launch.tpu_vm", "delete", *POD).returncode == runs.EXIT_USER
  assert tools.calls("delete") == []
  assert tools.here("launch.tpu_vm", "delete", *POD, stdin="pod\n").returncode == 0
  assert len(tools.calls("tpu-vm delete")) == 1
  done = tools.here("launch.tpu_vm", "delete", *POD, "--yes")
  assert done.returncode == 0
  assert "no such pod" in done.stdout


def test_status_and_logs_of_a_run(tools):
  assert "pod: absent" in tools.here("launch.tpu_vm", "status", *POD).stdout
  tools.scenario(node="READY")
  done = tools.here("launch.tpu_vm", "status", *POD)
  assert "pod: ready (node READY)" in done.stdout
  assert "no run yet" in done.stdout
  here = tools.folder / "worker" / "reprise-runs" / "pod"
  here.mkdir(parents=True)
  (here / "log").write_text("step 1\nstep 2\n")
  (here / "status").write_text("3\n")
  assert "ended with 3" in tools.here("launch.tpu_vm", "status", *POD).stdout
  done = tools.here("launch.tpu_vm", "logs", *POD, "--lines=1")
  assert "step 2" in done.stdout
  assert "step 1" not in done.stdout


def test_a_variable_that_a_worker_lacks_is_told_before_anything_runs(tools):
  asked = ("run", *POD, "--topology=v5e:4x4", "--workdir=/shared/x", "--env=HF_TOKEN", *JOB)
  done = tools.here("launch.tpu_vm", *asked, HF_TOKEN=CANARY)  # ours does not go along
  assert done.returncode == runs.EXIT_USER
  assert "env=HF_TOKEN: neither in the worker's environment nor in the secret manager" in done.stdout
  assert CANARY not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="no gcloud here")
@pytest.mark.parametrize("topology", ["v5e:4x4", "v4:4x8x8", "v5p:8x8x8"])
@pytest.mark.parametrize("queued", [(), ("--queued", "--spot")], ids=["now", "queued"])
def test_the_real_gcloud_knows_the_flags(tools, tmp_path, topology, queued):
  """It gets past its parser, to the sign-in that is kept from it here; whatever it would reach is not there."""
  offline = {
    "CLOUDSDK_CONFIG": str(tmp_path),
    "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
    "CLOUDSDK_CORE_PROJECT": "none",
    "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": "http://localhost:9/",
  }
  printed = tools.here(
    "launch.tpu_vm", "run", *POD, f"--topology={topology}", *queued, "--workdir=gs://b/x", "--dry-run", *JOB
  )
  printed = printed.stdout + tools.here("launch.tpu_vm", "delete", *POD, "--dry-run").stdout
  lines = [shlex.split(line) for line in printed.splitlines() if line.startswith("gcloud")]
  assert len(lines) == 8
  for line in lines:
    done = subprocess.run(line, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    assert "active account" in done.stderr, done.stderr
