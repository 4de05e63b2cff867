"""Lightning Attention-1 computes what the dense form does, packed documents and ends of rows included."""

import functools

import jax
import numpy as np
import pytest

from experiments.transnormer import quadratic
from experiments.transnormer.experiment import Config, build
from research.kernels.lightning_attention import reference
from research.kernels.lightning_attention.api import lightning_attention
from research.mesh import MeshConfig
from tests import small

DECAY = np.exp(-np.array([0.0, 0.1, 7.0]))


def operands(length, d_k=5, d_v=4, seed=0):
  rng = np.random.default_rng(seed)
  q, k = rng.standard_normal((2, 2, length, 3, d_k))
  segments = np.repeat([[1, 2], [1, 1]], [length // 3, length - length // 3], axis=1)
  return q, k, rng.standard_normal((2, length, 3, d_v)), segments


@pytest.mark.parametrize(("length", "tile"), [(13, 4), (5, 128)])
def test_values_and_gradients_are_the_dense_forms(length, tile):
  *qkv, segments = operands(length)
  weights = np.random.default_rng(1).standard_normal(qkv[2].shape)

  def run(f):
    def loss(q, k, v):
      out, final = f(q, k, v, DECAY, segments)
      return (out * weights).sum(), (out, final)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)

  with jax.enable_x64(True):
    got, want = run(functools.partial(quadratic.attention, tile=tile)), run(reference.attention)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-12)


def test_a_mesh_changes_nothing_and_the_architecture_takes_it():
  *qkv, segments = (np.float32(x) for x in operands(9))
  q, k, v = (np.concatenate([x, x[:, :, :1]], axis=2) for x in qkv)  # four heads
  decay, segments = np.exp(-np.arange(4, dtype=np.float32)), segments.astype(np.int32)

  def run(mesh, devices, implementation):
    f = lambda *x: (lightning_attention(*x, decay, segment_ids=segments, implementation=implementation)[0] ** 2).sum()
    with small.use(mesh, devices):
      return jax.device_get(jax.block_until_ready(jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(q, k, v)))

  tiles, chunks = run(MeshConfig(1, 2, 2), 4, quadratic.attention), run(None, 1, "xla")
  for a, b in zip(jax.tree.leaves(tiles), jax.tree.leaves(chunks), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  with small.use():
    model = jax.eval_shape(build(Config(architecture="quadratic")).init, jax.random.key(0))
  assert model.blocks.attention.implementation is quadratic.attention


def test_training_does_not_pay_for_a_state_that_nobody_asks_for():
  *qkv, _ = operands(256)
  loss = lambda q, k, v: (quadratic.attention(q, k, v, DECAY)[0] ** 2).sum()
  program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*map(np.float32, qkv)).as_text()
  assert program.count("stablehlo.while") == 4  # rows and columns, and the tiles of each: no chunks
