"""A checkpoint comes back bit for bit, or is reported: on real files, with real damage."""

import dataclasses
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

from flax import nnx
import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.checkpoint import Checkpoints, SaveFailed, fingerprints
from research.errors import UserError
from research.mesh import MeshConfig, make_mesh

ROOT = pathlib.Path(__file__).parents[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  step: jax.Array
  model: nnx.Module
  opt: optax.OptState
  key: jax.Array
  extra: dict[str, jax.Array]


class Net(nnx.Module):
  def __init__(self, key: jax.Array):
    normal = jax.nn.initializers.normal()
    self.embed = nnx.Param(normal(key, (256, 64), jnp.float32, out_sharding=P("data", "model")))
    self.layers = nnx.List(
      [nnx.Param(normal(jax.random.fold_in(key, i), (64, 8), jnp.bfloat16, out_sharding=P("model"))) for i in range(2)]
    )


def make_state(seed: int, mesh=None) -> State:
  with jax.set_mesh(mesh or make_mesh(MeshConfig(model=2))):
    model = Net(jax.random.key(seed))
    tx = optax.adamw(1e-3)
    updates, opt = tx.update(jax.tree.map(jnp.ones_like, model), tx.init(model), model)
    extra = {
      "keys": jax.random.split(jax.random.key(seed), 4),
      "empty": jnp.zeros((0, 3)),
      "mask": jnp.arange(4) > 1,
      "odd name. %é": jnp.arange(4, dtype=jnp.int8),
    }
    return State(jnp.int32(seed), optax.apply_updates(model, updates), opt, jax.random.key(seed), extra)


def abstract(state: State, mesh=None) -> State:
  sharding = lambda x: jax.NamedSharding(mesh, x.sharding.spec) if mesh else x.sharding
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)), state)


def bits(x: jax.Array) -> tuple:
  data = jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return x.shape, str(x.dtype), np.asarray(data).tobytes()


def assert_same(actual: State, expected: State) -> None:
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
    assert bits(a) == bits(b), path


@pytest.fixture(scope="module")
def states() -> dict[int, State]:
  return {step: make_state(step) for step in (10, 20)}


@pytest.fixture(scope="module")
def sound(states, tmp_path_factory) -> pathlib.Path:
  """A directory with steps 10 and 20; copy it before damaging it."""
  directory = tmp_path_factory.mktemp("sound")
  with Checkpoints(directory) as ckpt:
    for step, state in states.items():
      ckpt.save(step, state, {"position": [step, None, 0.1]}, {"commit": "abc", "nested": {"é": step}})
  return directory


@pytest.fixture
def copy(sound, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(sound, tmp_path / "run"))


def files(directory: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path for path in directory.rglob("*") if path.is_file())


def snapshot(directory: pathlib.Path) -> dict[str, bytes]:
  return {str(path.relative_to(directory)): path.read_bytes() for path in files(directory)}


def flip(path: pathlib.Path, bit: int) -> None:
  with open(path, "r+b") as f:
    f.seek(bit // 8)
    byte = f.read(1)[0]
    f.seek(bit // 8)
    f.write(bytes([byte ^ 1 << bit % 8]))


def assert_right_or_reported(directory: pathlib.Path, states: dict[int, State]) -> bool:
  """Restores; the newest step must be exact, or reported and the one before exact. True if it fell back."""
  ckpt = Checkpoints(directory)
  restored = ckpt.restore(abstract(states[20]))
  assert_same(restored.state, states[restored.step])
  assert restored.data_state == {"position": [restored.step, None, 0.1]}
  assert restored.metadata == {"commit": "abc", "nested": {"é": restored.step}}
  if restored.step == 20:
    assert ckpt.reports == []
    return False
  assert len(ckpt.reports) == 1
  assert ckpt.reports[0].startswith("checkpoint step 20 is damaged (")
  assert ckpt.reports[0].endswith("; using step 10")
  assert "\n" not in ckpt.reports[0]
  return True


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


# The hash.


def reference_hash(array: np.ndarray) -> str:
  """The hash's definition, in Python integers."""

  def mix(x: int, first: int, second: int) -> int:
    x = (x ^ x >> 16) * first % 2**32
    x = (x ^ x >> 13) * second % 2**32
    return x ^ x >> 16

  array = np.ascontiguousarray(array)
  words = array.view(f"uint{8 * min(array.dtype.itemsize, 4)}").ravel().tolist()
  sums = []
  for odd in ((0x85EBCA6B, 0xC2B2AE35), (0x7FEB352D, 0x846CA68B)):
    sums.append(sum(mix(word ^ mix(place, *odd), *odd) for place, word in enumerate(words)) % 2**32)
  return "".join(f"{part:08x}" for part in sums)


DTYPES = ["int8", "uint16", "int32", "uint32", "int64", "bfloat16", "float16", "float32", "float64", "float8_e4m3fn"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_bit_changes_the_hash(dtype):
  dtype = jnp.dtype(dtype)
  raw = np.random.default_rng(0).integers(0, 256, size=4 * dtype.itemsize, dtype=np.uint8)
  variants = {"unchanged": raw.view(dtype)}
  for bit in range(8 * raw.size):
    flipped = raw.copy()
    flipped[bit // 8] ^= 1 << bit % 8
    variants[str(bit)] = flipped.view(dtype)
  with jax.enable_x64(True):
    hashes = fingerprints({name: jnp.asarray(array) for name, array in variants.items()})
  assert len(set(hashes.values())) == len(variants)
  base = hashes.pop("unchanged")
  assert base == reference_hash(raw.view(dtype))
  halves = {(h[:8] == base[:8]) or (h[8:] == base[8:]) for h in hashes.values()}
  assert halves == {False}  # either half alone would do


def test_the_hash_sees_swaps_and_zeros_and_flags():
  x = np.arange(64, dtype=np.float32)
  swaps = {f"{i},{j}": x.copy() for i in range(8) for j in range(i)}
  for name, array in swaps.items():
    i, j = map(int, name.split(","))
    array[[i, j]] = array[[j, i]]
  hashes = fingerprints({"x": jnp.asarray(x)} | {name: jnp.asarray(array) for name, array in swaps.items()})
  assert len(set(hashes.values())) == len(swaps) + 1
  flags = [np.array([a, b]) for a in (False, True) for b in (False, True)]
  assert len(set(fingerprints({str(i): jnp.asarray(flag) for i, flag in enumerate(flags)}).values())) == 4
  assert fingerprints({"-": jnp.float32(-0.0)}) != fingerprints({"-": jnp.float32(0.0)})
  assert fingerprints({"empty": jnp.zeros((0, 3))}) == {"empty": "0" * 16}


SPECS = [P(), P("data"), P("model", "data"), P(("data", "model")), P(None, "model"), P(None, None, ("model", "data"))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "bool"])
def test_the_hash_does_not_depend_on_the_sharding(dtype):
  with jax.enable_x64(True):
    array = np.random.default_rng(0).normal(size=(8, 4, 4)).astype(jnp.dtype(dtype))
    mesh = make_mesh(MeshConfig(model=2))
    cut = {str(spec): jax.device_put(array, jax.NamedSharding(mesh, spec)) for spec in SPECS}
    hashes = set(fingerprints(cut).values())
    with jax.set_mesh(mesh):
      hashes |= set(fingerprints(cut | {"inside": jnp.asarray(array)}).values())
  assert hashes == {reference_hash(array)}


# Damage.


def test_flipped_bits_never_give_wrong_values(copy, states):
  rng = random.Random(0)
  targets = [path for path in files(copy / "20") if path.stat().st_size]
  largest = sorted(targets, key=lambda path: path.stat().st_size)[-2:]
  chosen = [path for path in targets for _ in range(3)] + largest * 15
  assert len(chosen) >= 60
  before = snapshot(copy)
  fell_back = {}
  for path in chosen:
    bit = rng.randrange(8 * path.stat().st_size)
    flip(path, bit)
    fell_back[path, bit] = assert_right_or_reported(copy, states)
    flip(path, bit)
  assert snapshot(copy) == before  # nothing was deleted or rewritten
  assert sum(fell_back.values()) > 20
  assert not assert_right_or_reported(copy, states)


def test_truncated_and_missing_files_never_give_wrong_values(copy, states):
  needed = {copy / "20" / "record" / "data.json", copy / "20" / "arrays" / "manifest.ocdbt"}
  needed.add(max(files(copy / "20"), key=lambda path: path.stat().st_size))
  for path in files(copy / "20"):
    content = path.read_bytes()
    for size in {0, len(content) // 2} if content else ():
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


def damage_data(directory: pathlib.Path, step: int) -> None:
  path = directory / str(step) / "record" / "data.json"
  path.write_text(path.read_text().replace('"hash": "', '"hash": "0', 1))


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
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
  command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path / "run"), port]
  children = [subprocess.Popen([*command, process, damage], cwd=ROOT) for process in "01"]
  assert [child.wait(timeout=200) for child in children] == [0, 0]
  assert sorted(os.listdir(tmp_path / "run")) == ["20", "30", "30.damaged"]
