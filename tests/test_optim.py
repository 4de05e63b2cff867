"""Schedules, decay masks and the two optimisers."""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from experiments.kvshift.attention import KVShift
from research import optim
from research.mesh import MeshConfig
from research.models.transformer import Transformer
from research.optim import OptimizerConfig
from tests import small

NO_DECAY = ("scale", "mix")


def named(tree):
  return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def model_and_update(cfg, mesh=None, devices=1, gradient=None):
  """A model and its first update from fixed gradients, as {name: array}."""
  with small.use(mesh, devices):
    tx = optim.make(cfg, steps=10)

    @jax.jit
    def step():
      model = Transformer(jax.random.key(0), small.MODEL, mix=KVShift)
      grads = jax.tree.map(jnp.sin, model) if gradient is None else jax.tree.map(gradient, model)
      updates, _ = tx.update(grads, tx.init(model), model)
      return model, updates

    model, updates = step()
  return named(jax.device_get(model)), named(jax.device_get(updates))


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("constant", {0: 0.1, 9: 1.0, 10: 1.0, 99: 1.0}),
    ("cosine", {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 0.55, 100: 0.1}),
    ("wsd", {0: 0.1, 9: 1.0, 10: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
  ],
)
def test_schedules_at_known_points(name, expected):
  f = optim.schedule(OptimizerConfig(lr=1.0, schedule=name, warmup=10, decay=0.2, final=0.1), steps=100)
  for step, rate in expected.items():
    assert float(f(step)) == pytest.approx(rate, abs=1e-6), step


def test_without_warm_up_the_first_step_has_the_full_rate():
  f = optim.schedule(OptimizerConfig(lr=1.0, schedule="constant", warmup=0), steps=100)
  assert float(f(0)) == 1.0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_pulls_on_weights_and_embeddings_but_not_on_norms_and_coefficients(name):
  cfg = OptimizerConfig(name=name, lr=1.0, schedule="constant", warmup=0, weight_decay=0.5)
  model, updates = model_and_update(cfg, gradient=jnp.zeros_like)
  for path, update in updates.items():
    decay = 0.0 if any(part in path for part in NO_DECAY) else -0.5
    np.testing.assert_allclose(update, decay * model[path], err_msg=path, atol=1e-7)
  assert sum(any(part in path for part in NO_DECAY) for path in updates) == 5


def test_adamw_is_the_textbooks():
  cfg = OptimizerConfig(lr=0.1, schedule="constant", warmup=0, weight_decay=0.01, clip=0.0, b1=0.9, b2=0.95, eps=1e-8)
  model, updates = model_and_update(cfg)
  for path, p in model.items():
    g = np.sin(p.astype(np.float64))
    decay = 0.0 if any(part in path for part in NO_DECAY) else 0.01
    np.testing.assert_allclose(updates[path], -0.1 * (g / (np.abs(g) + 1e-8) + decay * p), rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_norm_of_the_gradients():
  # with a constant eps far above the gradients, Adam's first step is linear in them
  cfg = OptimizerConfig(lr=1.0, schedule="constant", warmup=0, weight_decay=0.0, clip=0.5, eps=1e6)
  _, clipped = model_and_update(cfg)
  _, free = model_and_update(dataclasses.replace(cfg, clip=0.0))
  assert float(optax.tree.norm(clipped)) * 1e6 == pytest.approx(0.5, rel=1e-3)
  assert float(optax.tree.norm(free)) * 1e6 > 1


def test_muon_makes_every_matrix_of_every_layer_and_head_orthogonal():
  cfg = OptimizerConfig(name="muon", lr=1.0, schedule="constant", warmup=0, weight_decay=0.0)
  model, updates = model_and_update(cfg)
  up = updates[".blocks.mlp.up.value"]  # [layers, width, 2, hidden]: gate and up of each layer
  qkv = updates[".blocks.attention.qkv.value"]  # [layers, width, kv_heads, group + 2, head_dim]
  matrices = [up[layer, :, i] for layer in range(2) for i in range(2)] + [qkv[1, :, 1, j] for j in range(4)]
  for matrix in matrices:
    singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
    assert ((singular > 0.6) & (singular < 1.3)).all()  # five Newton-Schulz steps reach about this
  embed = updates[".embed.value"]  # the rest is Adam: +-1 at the first step
  np.testing.assert_allclose(np.abs(embed), 1.0, atol=5e-3)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_updates_are_the_same_on_a_mesh(name):
  cfg = OptimizerConfig(name=name, warmup=0)
  _, one = model_and_update(cfg)
  _, four = model_and_update(cfg, MeshConfig(1, 2, 2), devices=4)
  for path in one:
    np.testing.assert_allclose(one[path], four[path], rtol=2e-4, atol=1e-6, err_msg=path)
