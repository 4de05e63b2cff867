"""Small models and batches that the tests share."""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np

from research import mesh as meshes
from research.mesh import MeshConfig
from research.models.transformer import TransformerConfig

MODEL = TransformerConfig(
  vocab=64,
  width=32,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  mlp_width=48,
  precision="float32",
  layer_loop="scan",  # compiles sooner than unrolled
)

# Every way to lay four devices out under every partition.
MESHES = [
  MeshConfig(1, 4, 1, "replicated"),
  MeshConfig(2, 2, 1, "fsdp"),
  MeshConfig(1, 4, 1, "fsdp"),
  MeshConfig(4, 1, 1, "fsdp_tp"),
  MeshConfig(1, 2, 2, "fsdp_tp"),
  MeshConfig(2, 1, 2, "fsdp_tp"),
]


def use(mesh: MeshConfig | None = None, devices: int = 1):
  """`with use(...):` a mesh over the first `devices` devices is the current one."""
  mesh = mesh or MeshConfig()
  return jax.set_mesh(meshes.make_mesh(mesh, jax.devices()[:devices]))


def batch(rows: int = 8, length: int = 24, vocab: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
  """Random packed rows: two or three documents each, the last row padded at its end."""
  rng = np.random.default_rng(seed)
  cuts = np.sort(rng.integers(1, length, size=(rows, 2)), axis=1)
  at = np.arange(length)
  segments = 1 + (at >= cuts[:, :1]) + (at >= cuts[:, 1:])
  starts = np.where(segments == 1, 0, np.where(segments == 2, cuts[:, :1], cuts[:, 1:]))
  weights = np.ones((rows, length), np.float32)
  segments[-1, -3:], weights[-1, -3:] = 0, 0
  return {
    "tokens": rng.integers(vocab, size=(rows, length), dtype=np.int32),
    "targets": rng.integers(vocab, size=(rows, length), dtype=np.int32),
    "segment_ids": segments.astype(np.int32),
    "positions": (at - starts).astype(np.int32),
    "weights": weights,
  }


def varied(**changes) -> TransformerConfig:
  """The small model with some fields changed."""
  return dataclasses.replace(MODEL, **changes)


def leaves(tree) -> list[np.ndarray]:
  """The arrays of a tree on the host; keys as their data."""
  plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return [np.asarray(jax.device_get(plain(x))) for x in jax.tree.leaves(tree)]
