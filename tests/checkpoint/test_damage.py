"""What is damaged is found, told and passed over, and never restored as something else."""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest

from research.checkpoint import Checkpoints
from research.errors import UserError
from tests.checkpoint.states import (
  abstract,
  assert_right_or_reported,
  damage_data,
  files,
  flip,
  snapshot,
)
from tests.processes import ROOT, free_port


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_flipped_bits_never_give_wrong_values(copy, states, times):
  rng = random.Random(0)
  targets = [path for path in files(copy / "20") if path.stat().st_size]
  largest = sorted(targets, key=lambda path: path.stat().st_size)[-2:]
  chosen = [path for path in targets for _ in range(times)] + largest * 5 * times
  assert len(chosen) >= 20 * times
  before = snapshot(copy)
  fell_back = {}
  for path in chosen:
    bit = rng.randrange(8 * path.stat().st_size)
    flip(path, bit)
    fell_back[path, bit] = assert_right_or_reported(copy, states)
    flip(path, bit)
  assert snapshot(copy) == before  # nothing was deleted or rewritten
  assert sum(fell_back.values()) > 6 * times
  assert not assert_right_or_reported(copy, states)


@pytest.mark.parametrize("parts", [(2,), pytest.param((0, 1, 2, 3), marks=pytest.mark.slow)])
def test_truncated_and_missing_files_never_give_wrong_values(copy, states, parts):
  needed = {copy / "20" / "record" / "data.json", copy / "20" / "arrays" / "manifest.ocdbt"}
  needed.add(max(files(copy / "20"), key=lambda path: path.stat().st_size))
  for path in files(copy / "20"):
    content = path.read_bytes()
    for size in {len(content) * part // 4 for part in parts} if content else ():
      path.write_bytes(content[:size])
      assert assert_right_or_reported(copy, states) or path not in needed
    path.unlink()
    assert assert_right_or_reported(copy, states) or path not in needed
    path.write_bytes(content)


def test_an_array_lost_from_the_index_is_damage(copy, states):
  index = copy / "20" / "arrays" / "_METADATA"
  entries = json.loads(index.read_text())
  lost = next(name for name in entries["tree_metadata"] if "mask" in name)
  del entries["tree_metadata"][lost]
  index.write_text(json.dumps(entries))
  assert assert_right_or_reported(copy, states)


def test_an_emptied_step_falls_back(copy, states):
  shutil.rmtree(copy / "20")
  (copy / "20").mkdir()
  assert assert_right_or_reported(copy, states)
  (copy / "20").rmdir()
  (copy / "20").write_text("a file")
  assert assert_right_or_reported(copy, states)


def test_a_copied_step_under_another_number_is_damage(copy, states):
  (copy / "20").rename(copy / "30")
  restored = Checkpoints(copy).restore(abstract(states[20]))
  assert restored.step == 10


def test_when_every_step_is_damaged_it_says_so_and_keeps_all(copy, states):
  damage_data(copy, 10)
  damage_data(copy, 20)
  before = snapshot(copy)
  ckpt = Checkpoints(copy)
  with pytest.raises(UserError, match=r"every step .* damaged \(20: record: hash differs; 10: record: hash differs\)"):
    ckpt.restore(abstract(states[20]), quarantine=True)
  assert len(ckpt.reports) == 2
  assert snapshot(copy) == before


def test_a_named_step_that_is_damaged_is_an_error_and_not_another_step(copy, states):
  damage_data(copy, 20)
  with pytest.raises(UserError, match="20: record: hash differs"):
    Checkpoints(copy).restore(abstract(states[20]), step=20)


def test_quarantine_sets_damaged_steps_aside_so_that_they_can_be_saved_again(copy, states):
  ckpt = Checkpoints(copy, keep_last=1)
  for n, name in enumerate(["20.damaged", "20.damaged-2"], start=1):
    damage_data(copy, 20)
    damaged = snapshot(copy / "20")
    assert ckpt.restore(abstract(states[20]), quarantine=True).step == 10
    assert ckpt.steps() == [10]
    assert snapshot(copy / name) == damaged
    ckpt.save(20, states[20], {"position": [20, None, 0.1]}, {"commit": "abc", "nested": {"é": 20}})
    assert len(ckpt.reports) == n
    if n == 1:
      ckpt._pending[1].result()  # keep step 10 for the second round: no retention yet
      ckpt._pending = None
  ckpt.close()
  assert not assert_right_or_reported(copy, states)
  assert sorted(os.listdir(copy)) == ["20", "20.damaged", "20.damaged-2"]


@pytest.mark.slow
def test_many_flipped_bits_never_give_wrong_values(copy, states):
  rng = random.Random(1)
  targets = [path for path in files(copy / "20") if path.stat().st_size]
  for path in targets * 20:
    bit = rng.randrange(8 * path.stat().st_size)
    flip(path, bit)
    assert_right_or_reported(copy, states)
    flip(path, bit)


TWO_PROCESSES = """
import pathlib, sys
import jax, jax.numpy as jnp
from jax.experimental import multihost_utils
directory, port, process, damage = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
from research.checkpoint import Checkpoints
from research.mesh import MeshConfig, make_mesh
jax.set_mesh(make_mesh(MeshConfig()))
normal = lambda key: jax.random.normal(key, (64, 64), out_sharding=jax.P("data"))
make = jax.jit(lambda n: {"x": normal(jax.random.key(n)), "key": jax.random.key(n), "empty": jnp.zeros((0, 2))})
ckpt = Checkpoints(directory, keep_last=2)
for step in (10, 20, 30):
  ckpt.save(step, make(step), {"at": step}, {})
ckpt.wait()
assert ckpt.steps() == [20, 30]
if process == 0:  # in what only the other process reads
  files = (directory / "30" / "arrays" / "ocdbt.process_1" / "d").iterdir()
  path = max(files, key=lambda path: path.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content if damage == "flip" else content[:100])
multihost_utils.sync_global_devices("damaged")
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(0))
restored = ckpt.restore(abstract, quarantine=True)
assert restored.step == 20 and restored.data_state == {"at": 20}
assert jax.jit(lambda a, b: jnp.all(a["x"] == b["x"]) & (a["key"] == b["key"]))(restored.state, make(20))
assert len(ckpt.reports) == 1, ckpt.reports
ckpt.save(30, restored.state, {}, {})
ckpt.close()
assert ckpt.steps() == [20, 30]
"""


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_two_processes_agree_on_the_step_when_one_of_them_meets_damage(tmp_path, damage):
  port = str(free_port())
  command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path / "run"), port]
  children = [subprocess.Popen([*command, process, damage], cwd=ROOT) for process in "01"]
  assert [child.wait(timeout=200) for child in children] == [0, 0]
  assert sorted(os.listdir(tmp_path / "run")) == ["20", "30", "30.damaged"]
