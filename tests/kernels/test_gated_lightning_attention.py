"""The layer around linear attention: the TPU's one kernel a direction is the float64 composition of its parts."""

import functools

import jax
from jax import numpy as jnp
from jax.experimental.pallas import tpu as pltpu
import numpy as np
import pytest

from research.errors import UserError
from research.kernels.lightning_attention import pallas_tpu_gated, reference
from research.kernels.lightning_attention.features import activate, phases
from research.kernels.lightning_attention.gated import gated_lightning_attention
from research.mesh import MeshConfig, make_mesh


def operands(batch, length, heads, d, parts=4, phased=False, segments=True, dtype=np.float32, seed=0):
  """qkvu, decay, theta, positions, segment ids, initial state; the cotangents of the three results."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  decay = np.exp(-np.array([0, 8, 0.01, 0.5, 0.1, 2])[np.arange(heads) % 6]).astype(np.float32)
  theta, positions = None, None
  if phased:
    theta = (10000 ** -rng.random((heads, d))).astype(np.float32)
    positions = rng.integers(0, 50, (batch, length)).astype(np.int32)  # in any order
  ids = np.sort(rng.integers(0, 4, (batch, length)), axis=1).astype(np.int32) if segments else None
  state = normal(batch, heads, d * (1 + phased), d)
  args = np.asarray(normal(batch, length, heads, parts, d), dtype), decay, theta, positions, ids, state
  return args, (np.asarray(normal(batch, length, heads, d), dtype), normal(batch, length, heads), normal(*state.shape))


def kernel(qkvu, decay, theta, positions, ids, state, activation="silu", **how):
  """The TPU's, in Pallas's interpreter, as `gated_lightning_attention` calls it."""
  theta = theta if theta is None else jnp.broadcast_to(theta, (len(qkvu), *theta.shape))
  how = {"block": 128, "interpret": True} | how
  return pallas_tpu_gated.attention(qkvu, decay, theta, positions, ids, state, activation=activation, **how)


def dense(qkvu, decay, theta, positions, ids, state, activation="silu", rounded=lambda x: x):
  """The definition; `rounded`: what the matrix units take, and how the cotangent of the attention reaches them."""
  q, k, v, *u = (qkvu[:, :, :, i] for i in range(qkvu.shape[3]))
  q, k = (rounded(activate(activation, z)) for z in (q, k))
  if theta is not None:
    q, k = (rounded(phases(z, positions, theta)) for z in (q, k))
  out, final = reference.attention(q, k, v, decay, ids, state)
  squares = (out**2).sum(-1)
  return (out * u[0] if u else out), squares, final


def value_and_grads(f, args, cotangents):
  """(out, squares, final state, gradients of qkvu, initial state and, where it is, theta)."""
  qkvu, decay, theta, positions, ids, state = args
  call = lambda qkvu, state, theta: f(qkvu, decay, theta, positions, ids, state)
  value, vjp = jax.vjp(call, qkvu, state, theta)
  return [*value, *(x for x in vjp(cotangents) if x is not None)]


def truth(args, cotangents, f=dense):
  with jax.enable_x64(True):
    wide = lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x)
    args, cotangents = jax.tree.map(wide, (args, cotangents))
    return jax.tree.map(np.asarray, jax.jit(functools.partial(value_and_grads, f))(args, cotangents))


def relative_errors(got, want):
  size = lambda x: np.abs(x).max()
  return [size(np.asarray(g, np.float64) - w) / (size(w) or 1) for g, w in zip(got, want, strict=True)]


SHAPES = [
  dict(batch=2, length=200, heads=2, d=64),
  dict(batch=1, length=130, heads=3, d=64, phased=True),
  dict(batch=2, length=37, heads=1, d=96, parts=3),
  dict(batch=1, length=256, heads=1, d=128, segments=False, phased=True, parts=3),
  dict(batch=1, length=1, heads=2, d=128),
  dict(batch=1, length=70, heads=5, d=8, phased=True),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_values_and_gradients_are_the_references(shape):
  args, cotangents = operands(**shape)
  got = jax.jit(functools.partial(value_and_grads, kernel))(args, cotangents)
  print(relative_errors(got, truth(args, cotangents)))
  assert max(relative_errors(got, truth(args, cotangents))) < 2e-6
