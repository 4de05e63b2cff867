"""A run's files in a bucket, gs://: a real storage server on 127.0.0.1, real processes, real signals."""

import functools
import http.server
import importlib.util
import json
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from experiments.kvshift.experiment import build
from research import paths, report, run, runs
from research.checkpoint import Checkpoints
from research.errors import UserError
from research.tools import generate
from tests import test_resume as local

# Not imported here: how that is done is for research.paths to say.
has = lambda *names: all(importlib.util.find_spec(name) for name in names)
with_gcs = pytest.mark.skipif(not has("gcsfs"), reason="needs the extra gcs")

TINY = "--config=experiments/kvshift/configs/main.py:tiny"


def reach(patch, address):
  """Google's three libraries find the storage at `address`, and nothing else."""
  for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
    patch.setenv(name, f"http://{address}")
  patch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")  # credentials are not looked for elsewhere
  patch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)


def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


@pytest.fixture(scope="module")
def bucket():
  """An empty bucket, for this process and those that it starts."""
  if not has("gcsfs", "gcp_storage_emulator"):
    pytest.skip("needs the extra test")
  port = free_port()
  arguments = ["--host=127.0.0.1", f"--port={port}", "--in-memory", "--default-bucket=bucket", "--quiet"]
  command = [sys.executable, "-m", "gcp_storage_emulator", "start", *arguments]
  server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  try:
    with pytest.MonkeyPatch.context() as patch:
      reach(patch, f"127.0.0.1:{port}")
      until = time.monotonic() + 60
      while socket.socket().connect_ex(("127.0.0.1", port)):
        assert server.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
      yield "gs://bucket"
  finally:
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run in a local directory that nothing interrupted."""
  workdir = tmp_path_factory.mktemp("whole")
  local.finish(workdir)
  return workdir


@pytest.fixture(scope="module")
def resumed(bucket):
  """The same run in a bucket, killed in the middle of a save and started again."""
  workdir = paths.parse(f"{bucket}/resumed")
  assert local.kill_when(workdir, functools.partial(saving, workdir))
  assert "Traceback" not in local.finish(workdir)
  return workdir


def saving(workdir):
  """Whether a later step than the first is begun and not finished."""
  begun = {p.name for p in (workdir / local.RUN).glob("*")} - {"4"}
  return any(not (workdir / local.RUN / name / "commit_success.txt").exists() for name in begun)


def test_killed_in_a_save_it_ends_the_same_as_in_a_local_directory(whole, resumed):
  local.same(resumed, whole)
  assert local.steps(resumed) == [24, 28, 30]
  launches = report.manifest(resumed)["launches"]
  assert [launch["argv"][-1] for launch in launches] == ["--workdir=gs://bucket/resumed"] * 2
  ours, theirs = (json.loads((w / "report" / "results.json").read_text())["results"] for w in (resumed, whole))
  assert ours == theirs
  assert (resumed / "report" / "validation_loss.png").read_bytes().startswith(b"\x89PNG")
  assert list((resumed / "tensorboard" / "kvshift-0").glob("events.*"))


def test_its_model_is_the_same(resumed, whole):
  with runs.mesh():
    ours, theirs = (jax.tree.leaves(runs.load(workdir)[1]) for workdir in (str(resumed), whole))
  assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_tools_read_it(resumed, whole, monkeypatch, capsys):
  told = []
  for workdir in (resumed, whole):
    arguments = [f"--workdir={workdir}", "--prompt=import ", "--tokens=8", "--temperature=0"]
    monkeypatch.setattr(sys, "argv", ["generate", *arguments])
    generate.main()
    told.append(capsys.readouterr().out)
  assert told[0] == told[1] != ""


def small(x):
  return {"x": jnp.full(1000, x), "key": jax.random.key(0)}


def save(directory, step):
  with Checkpoints(directory) as checkpoints:
    checkpoints.save(step, small(float(step)), {}, {})


def abstract():
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), small(0.0))


def test_a_damaged_step_is_set_aside_and_saved_again(bucket):
  directory = paths.parse(f"{bucket}/damaged")
  save(directory, 1)
  save(directory, 2)
  largest = directory / "2" / "arrays" / "d"
  for file in largest.iterdir():
    file.write_bytes(file.read_bytes()[:-40] + bytes(40))
  checkpoints = Checkpoints(directory)
  restored = checkpoints.restore(abstract(), quarantine=True)
  assert restored.step == 1
  assert restored.state["x"][0] == 1
  assert "step 2 is damaged" in checkpoints.reports[0]
  assert checkpoints.steps() == [1]
  assert sorted(p.name for p in directory.iterdir()) == ["1", "2.damaged"]
  assert len(list((directory / "2.damaged" / "arrays" / "d").iterdir())) >= 1
  save(directory, 2)
  assert Checkpoints(directory).restore(abstract()).state["x"][0] == 2


def test_what_a_killed_save_or_removal_left_does_not_count_and_goes(bucket):
  directory = paths.parse(f"{bucket}/left")
  save(directory, 1)
  save(directory, 2)
  for step in (1, 2):
    (directory / str(step) / "commit_success.txt").unlink()
  assert Checkpoints(directory).steps() == []
  assert Checkpoints(directory).restore(abstract()) is None
  save(directory, 2)
  assert [p.name for p in directory.iterdir()] == ["2"]
  assert Checkpoints(directory).restore(abstract()).state["x"][0] == 2


@pytest.fixture
def refusing():
  """A storage server that answers every request with `.status`; its address."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      body = json.dumps({"error": {"code": server.status, "message": "Anonymous caller has no access."}}).encode()
      self.send_response(server.status)
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield server
  server.shutdown()


def told_in_one_line(arguments, monkeypatch, capfd):
  monkeypatch.setattr(sys, "argv", ["x", TINY, *arguments])
  with pytest.raises(SystemExit) as exit_info:
    run.main(build)
  told = capfd.readouterr().err
  assert exit_info.value.code == run.EXIT_USER
  assert told.startswith("error: ")
  assert told.count("\n") == 1, told
  return told


@with_gcs
@pytest.mark.parametrize(
  ("status", "says"),
  [(401, "gcloud auth"), (403, "storage.objectAdmin"), (404, "no bucket"), (400, "cannot be reached")],
)
def test_a_bucket_that_cannot_be_used_is_told_in_one_line(status, says, refusing, monkeypatch, capfd, tmp_path):
  refusing.status = status
  reach(monkeypatch, f"127.0.0.1:{refusing.server_port}")
  told = told_in_one_line(["--workdir=gs://mine/run"], monkeypatch, capfd)
  assert told.startswith("error: workdir=gs://mine/run: ")
  assert says in told
  told = told_in_one_line(["--config.init_from=gs://mine/run", f"--workdir={tmp_path}"], monkeypatch, capfd)
  assert told.startswith("error: init_from=gs://mine/run: ")
  assert says in told
  with pytest.raises(UserError, match=says):
    runs.find("gs://mine/run")


def test_mistakes_with_a_bucket_are_told_in_one_line(bucket, monkeypatch, capfd, tmp_path):
  tell = lambda *arguments: told_in_one_line([*arguments], monkeypatch, capfd)
  assert "there is no bucket gs://other: gcloud storage buckets create" in tell("--workdir=gs://other/run")
  assert "names no bucket" in tell("--workdir=gs://")
  assert "gs://BUCKET/DIR" in tell("--workdir=s3://bucket/run")
  assert "no checkpoint there" in tell(f"--config.resume={bucket}/nowhere", f"--workdir={tmp_path}")
  with pytest.raises(UserError, match=r"has no manifest\.json"):
    runs.find(f"{bucket}/nowhere")


def test_without_the_extra_it_is_named(monkeypatch, capfd):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  told = told_in_one_line(["--workdir=gs://bucket/run"], monkeypatch, capfd)
  assert told == "error: workdir=gs://bucket/run: needs the extra gcs: pip install -e '.[gcs]'\n"


@pytest.mark.slow
def test_nobody_answering_is_told_in_one_line(bucket, monkeypatch, capfd):
  reach(monkeypatch, "127.0.0.1:1")
  told = told_in_one_line(["--workdir=gs://bucket/run"], monkeypatch, capfd)  # gcsfs tries for half a minute
  assert "gs://bucket cannot be reached" in told


@pytest.mark.slow
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(whole, bucket):
  workdir = paths.parse(f"{bucket}/flipped")
  local.finish(workdir)
  for file in (workdir / local.RUN / "30" / "arrays" / "d").iterdir():
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
  told = local.finish(workdir)
  assert "step 30 is damaged" in told
  assert "using step 28" in told
  local.same(workdir, whole)
  assert (workdir / local.RUN / "30.damaged").is_dir()


@pytest.mark.slow
def test_a_run_goes_on_and_starts_from_a_bucket(whole, resumed, tmp_path):
  local.finish(tmp_path / "from", f"--config.init_from={resumed}", "--config.tx.name=muon")
  evals = lambda workdir: [r["loss"] for r in local.history(workdir) if r["kind"] == "eval"]
  assert evals(tmp_path / "from")[0] == evals(whole)[-1]
  complete = resumed / local.RUN / "30" / "commit_success.txt"
  text = complete.read_text()
  complete.unlink()
  try:
    told = local.finish(tmp_path / "on", f"--config.resume={resumed}")
  finally:
    complete.write_text(text)
  assert "going on from step 28" in told
  assert local.arrays(tmp_path / "on") == local.arrays(whole)


@pytest.mark.slow
def test_two_processes_share_it(bucket):
  port = free_port()
  workdir = paths.parse(f"{bucket}/two")

  def start(kill):
    flags = [f"--coordinator=127.0.0.1:{port}", "--processes=2", "--config.model.width=64"]
    both = [local.start(workdir, *flags, f"--process={i}", devices=2) for i in range(2)]
    try:
      if kill:
        while not saving(workdir):
          assert [process.poll() for process in both] == [None, None]
          time.sleep(0.01)
        both[1].kill()
      told = [process.communicate(timeout=300)[1] for process in both]
    finally:
      for process in both:
        process.kill()
        process.wait()
    return [process.returncode for process in both], told

  statuses, told = start(kill=True)
  assert statuses == [run.EXIT_PEERS, -9], told
  statuses, told = start(kill=False)
  assert statuses == [0, 0], told
  assert local.steps(workdir) == [24, 28, 30]
  assert [r["step"] for r in local.history(workdir) if r["kind"] == "train"] == list(range(local.STEPS))


@pytest.mark.slow
def test_killed_ten_times_it_ends_the_same(whole, bucket):
  workdir = paths.parse(f"{bucket}/ten")
  hit = 0
  for i in range(10):
    before = len(local.steps(workdir))
    launched = time.monotonic()
    ready = lambda i=i, before=before, launched=launched: (
      len(local.steps(workdir)) > before or time.monotonic() > launched + 3 + i
    )
    hit += local.kill_when(workdir, ready)
  local.finish(workdir)
  local.same(workdir, whole)
  assert hit >= 5
