"""A checkpoint comes back bit for bit, on any mesh; a save is whole or not there, and nothing is cast on the way."""

import dataclasses
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest

from research.checkpoint import Checkpoints, SaveFailed
from research.errors import UserError
from research.mesh import MeshConfig, make_mesh
from tests.checkpoint.states import (
  State,
  abstract,
  assert_same,
  damage_data,
  snapshot,
)
from tests.processes import ROOT

# Round trips.


def test_a_state_comes_back_bit_for_bit_with_its_shardings(sound, states):
  restored = Checkpoints(sound).restore(abstract(states[20]))
  assert restored.step == 20
  assert_same(restored.state, states[20])
  for a, b in zip(jax.tree.leaves(restored.state), jax.tree.leaves(states[20]), strict=True):
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
  assert restored.data_state == {"position": [20, None, 0.1]}
  assert restored.metadata == {"commit": "abc", "nested": {"é": 20}}
  draw = lambda state: jax.random.normal(state.key, (3,)).tolist()
  assert draw(restored.state) == draw(states[20])


def test_a_named_step_is_restored(sound, states):
  restored = Checkpoints(sound).restore(abstract(states[10]), step=10)
  assert_same(restored.state, states[10])
  with pytest.raises(UserError, match=r"step=15: .* has the steps \[10, 20\]"):
    Checkpoints(sound).restore(abstract(states[10]), step=15)


def test_a_part_of_a_state_is_restored_only_where_that_is_asked_for(copy, states):
  part = {"model": abstract(states[20]).model}
  with pytest.raises(UserError, match="also holds extra/empty"):
    Checkpoints(copy).restore(part)
  assert_same(Checkpoints(copy).restore(part, partial=True).state, {"model": states[20].model})
  with pytest.raises(UserError, match="lacks other"):
    Checkpoints(copy).restore(part | {"other": part["model"].embed}, partial=True)
  damage_data(copy, 20)
  assert_same(Checkpoints(copy).restore(part, partial=True).state, {"model": states[10].model})


@pytest.mark.parametrize(("devices", "model"), [(4, 1), (4, 4), (2, 2), (2, 1), (1, 1)])
def test_a_state_is_restored_onto_another_mesh(sound, states, devices, model):
  mesh = make_mesh(MeshConfig(model=model), jax.devices()[:devices])
  restored = Checkpoints(sound).restore(abstract(states[20], mesh))
  assert_same(restored.state, states[20])
  assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(restored.state))


def test_nothing_to_restore_is_none(tmp_path, states):
  (tmp_path / "empty").mkdir()
  for name in ("empty", "missing"):
    ckpt = Checkpoints(tmp_path / name)
    assert ckpt.steps() == []
    assert ckpt.restore(abstract(states[10])) is None
    assert ckpt.reports == []


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
  sharding = jax.NamedSharding(make_mesh(MeshConfig(model=2)), P("data"))
  update = jax.jit(lambda x: x * 1.5 + 1, donate_argnums=0)
  x = update(jax.device_put(np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32), sharding))
  with Checkpoints(tmp_path, keep_last=5) as ckpt:
    values = {}
    for step in range(3):
      values[step] = np.array(x, copy=True)
      ckpt.save(step, {"x": x}, {}, {})
      for _ in range(4):
        x = update(x)
      x.block_until_ready()
  for step, value in values.items():
    restored = ckpt.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}, step)
    np.testing.assert_array_equal(restored.state["x"], value)


# Mistakes of the user.


def changed(state: State, **extra) -> State:
  return dataclasses.replace(abstract(state), extra=abstract(state).extra | extra)


def test_another_dtype_is_an_error_and_never_a_cast(sound, states):
  sharding = states[20].step.sharding
  with pytest.raises(UserError) as error:
    Checkpoints(sound).restore(changed(states[20], mask=jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding)))
  for part in ("extra/mask=float32", "as bool", "ask for bool"):
    assert part in str(error.value)


def test_another_shape_or_name_is_an_error(sound, states):
  leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=states[20].step.sharding)
  ckpt = Checkpoints(sound)
  with pytest.raises(UserError, match=r"holds extra/mask \[4\] \(now \[5\]\): .*config"):
    ckpt.restore(changed(states[20], mask=leaf(5)))
  with pytest.raises(UserError, match="lacks extra/a, extra/b, extra/c and 1 more: .*config"):
    ckpt.restore(changed(states[20], a=leaf(1), b=leaf(1), c=leaf(1), d=leaf(1)))
  fewer = dataclasses.replace(abstract(states[20]), extra={})
  with pytest.raises(UserError, match="also holds extra/empty, extra/keys, extra/mask and 1 more"):
    ckpt.restore(fewer)
  assert ckpt.reports == []


def test_a_sharding_that_does_not_fit_is_not_called_damage(sound, states):
  mesh = make_mesh(MeshConfig(model=3, data=1), jax.devices()[:3])
  ckpt = Checkpoints(sound)
  with pytest.raises(ValueError, match="partitioned 3 times"):
    ckpt.restore(abstract(states[20], mesh))
  assert ckpt.reports == []


def test_two_leaves_of_one_path_are_refused(tmp_path):
  with pytest.raises(ValueError, match="same path"):
    Checkpoints(tmp_path).save(1, {"a/b": jnp.ones(3), "a": {"b": jnp.ones(3)}}, {}, {})


# Saving.


def save_all(ckpt: Checkpoints, steps) -> None:
  for step in steps:
    ckpt.save(step, {"x": jnp.arange(4) + step}, {}, {})
  ckpt.wait()


def test_retention_keeps_the_last_and_every_kth(tmp_path):
  with Checkpoints(tmp_path, keep_last=2, keep_every=30) as ckpt:
    save_all(ckpt, range(0, 100, 10))
    assert ckpt.steps() == [0, 30, 60, 80, 90]
  save_all(Checkpoints(tmp_path, keep_last=1), [100])
  assert ckpt.steps() == [100]
  with pytest.raises(UserError, match="keep_last=0"):
    Checkpoints(tmp_path, keep_last=0)


def test_retention_does_not_count_steps_that_a_restore_passed_over(copy, states):
  damage_data(copy, 20)
  ckpt = Checkpoints(copy, keep_last=1)
  assert ckpt.restore(abstract(states[20])).step == 10
  ckpt.save(15, states[10], {}, {})
  ckpt.wait()
  assert ckpt.steps() == [15, 20]
  assert ckpt.restore(abstract(states[10])).step == 15


def test_what_a_killed_save_left_is_no_step_and_goes_with_the_next_save(tmp_path):
  left = tmp_path / "7.orbax-checkpoint-tmp" / "arrays"
  left.mkdir(parents=True)
  (left / "half").write_text("half")
  ckpt = Checkpoints(tmp_path)
  assert ckpt.steps() == []
  save_all(ckpt, [9])
  assert os.listdir(tmp_path) == ["9"]


def test_a_step_is_not_saved_over(copy, states):
  before = snapshot(copy)
  with pytest.raises(SaveFailed, match=r"step 20 was not saved in .*run: .*already exists"):
    Checkpoints(copy).save(20, states[10], {}, {})
  assert snapshot(copy) == before


def test_a_full_disk_surfaces_and_leaves_the_step_before(tmp_path):
  x = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
  ckpt = Checkpoints(tmp_path / "run")
  save_all(ckpt, [10])
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, limits[1]))  # larger files: EFBIG, as ENOSPC on a full disk
  try:
    ckpt.save(20, {"x": jnp.asarray(x)}, {}, {})
    with pytest.raises(SaveFailed, match=r"step 20 was not saved in .*run: "):
      ckpt.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert ckpt.steps() == [10]
  leaf = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=jnp.arange(4).sharding)
  np.testing.assert_array_equal(ckpt.restore({"x": leaf}).state["x"], np.arange(4) + 10)
  ckpt.save(20, {"x": jnp.asarray(x)}, {}, {})  # the half-written attempt is not in the way
  ckpt.close()
  assert ckpt.steps() == [10, 20]
  assert sorted(os.listdir(tmp_path / "run")) == ["10", "20"]


SAVES = """
import sys
import jax, jax.numpy as jnp
from research.checkpoint import Checkpoints
ckpt = Checkpoints(sys.argv[1], keep_last=2)
for step in range(1, 10_000):
  ckpt.save(step, {str(i): jax.random.normal(jax.random.key(step), (256, 256)) for i in range(4)}, {"at": step}, {})
  print(step, flush=True)
"""


def kill_while_saving(directory: pathlib.Path, rng: random.Random) -> bool:
  """True if the kill left a temporary directory."""
  child = subprocess.Popen([sys.executable, "-c", SAVES, str(directory)], stdout=subprocess.PIPE, cwd=ROOT, text=True)
  while child.stdout.readline().strip() != "3":
    assert child.poll() is None
  time.sleep(rng.random() * 0.3)
  child.send_signal(signal.SIGKILL)
  child.wait()
  left = list(directory.glob("*tmp*"))
  sharding = jnp.zeros(()).sharding
  ckpt = Checkpoints(directory, keep_last=2)
  restored = ckpt.restore({str(i): jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=sharding) for i in range(4)})
  assert ckpt.reports == []
  assert restored.step == ckpt.steps()[-1] >= 2
  assert restored.data_state == {"at": restored.step}
  expected = np.asarray(jax.random.normal(jax.random.key(restored.step), (256, 256)))
  for array in restored.state.values():
    np.testing.assert_array_equal(array, expected)
  ckpt.save(restored.step + 1, restored.state, {}, {})
  ckpt.close()
  assert ckpt.steps()[-2:] == [restored.step, restored.step + 1]
  assert not list(directory.glob("*tmp*"))
  return bool(left)


def test_a_killed_save_leaves_the_step_before(tmp_path):
  for i in range(2):
    kill_while_saving(tmp_path / str(i), random.Random(i))


@pytest.mark.slow
def test_kills_at_many_moments_leave_the_step_before(tmp_path):
  left = [kill_while_saving(tmp_path / str(i), random.Random(i)) for i in range(20)]
  assert any(left)
