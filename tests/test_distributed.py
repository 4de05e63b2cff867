"""Several processes are one run: the same losses, rows and checkpoints. Real processes, real signals, gloo."""

import json
import shutil

import numpy as np
import pytest

from tests.processes import RUN, free_port, go, history, losses


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


@pytest.mark.slow
def test_two_tasks_of_slurm_find_each_other(one, tmp_path):
  slurm = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
  port = {"JAX_COORDINATOR_PORT": str(free_port())}
  go(2, 2, tmp_path / "run", flags=lambda i: [], environment=lambda i: {**slurm, **port, "SLURM_PROCID": str(i)})
  same_losses(tmp_path / "run", one / "run")
