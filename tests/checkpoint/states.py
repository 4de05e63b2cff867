"""States to save, what tells one from another, and damage to their files."""

import dataclasses
import pathlib

from flax import nnx
import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import optax

from research.checkpoint import Checkpoints
from research.mesh import MeshConfig, make_mesh


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


def damage_data(directory: pathlib.Path, step: int) -> None:
  path = directory / str(step) / "record" / "data.json"
  path.write_text(path.read_text().replace('"hash": "', '"hash": "0', 1))
