"""The layer around linear attention: the TPU's one kernel a direction is the float64 composition of its parts."""

import functools
import re

import jax
from jax import numpy as jnp
from jax.experimental.pallas import tpu as pltpu
import numpy as np
import pytest

from research.errors import UserError
from research.kernels.lightning_attention import features, pallas_tpu_gated, reference
from research.kernels.lightning_attention.features import activate, phases
from research.kernels.lightning_attention.gated import gated_lightning_attention
from research.kernels.lightning_attention.tpu_gated_blocks import shape_of
from research.mesh import MeshConfig, make_mesh
from tests.kernels.test_lightning_attention import OF_V5E


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


def dense(qkvu, decay, theta, positions, ids, state, activation="silu", rounded=lambda x: x, answered=lambda x: x):
  """The definition. rounded: what attention is given; answered: what it gives, whose gradient goes back in."""
  q, k, v, *u = (qkvu[:, :, :, i] for i in range(qkvu.shape[3]))
  q, k = (rounded(activate(activation, z)) for z in (q, k))
  if theta is not None:
    q, k = (rounded(phases(z, positions, theta)) for z in (q, k))
  out, final = reference.attention(q, k, v, decay, ids, state)
  out = answered(out)
  return (out * u[0] if u else out), (out**2).sum(-1), final


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
  {"batch": 2, "length": 130, "heads": 2, "d": 64},  # two heads a block, a block that is not full
  {"batch": 1, "length": 70, "heads": 3, "d": 64, "phased": True},  # heads that do not fill lanes
  {"batch": 1, "length": 37, "heads": 1, "d": 96, "parts": 3},
  {"batch": 1, "length": 256, "heads": 1, "d": 128, "segments": False, "phased": True, "parts": 3},
  {"batch": 2, "length": 1, "heads": 1, "d": 128},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_values_and_gradients_are_the_references(shape):
  args, cotangents = operands(**shape)
  got = jax.jit(functools.partial(value_and_grads, kernel))(args, cotangents)
  assert max(relative_errors(got, truth(args, cotangents))) < 2e-6


def rounding(value, gradient):
  """x -> value(x), whose gradient is rounded by `gradient` on its way back."""
  f = jax.custom_vjp(value)
  f.defvjp(lambda x: (value(x), None), lambda _, g: (gradient(g),))
  return f


@pytest.mark.slow
def test_in_bf16_the_kernel_is_as_good_as_a_chain_that_rounds_nothing_else():
  """Than one in float64 that rounds what attention takes, forwards and backwards, and the results."""
  args, cotangents = operands(1, 200, 2, 64, phased=True, dtype=jnp.bfloat16)
  got = jax.jit(functools.partial(value_and_grads, kernel))(args, cotangents)
  want = truth(args, cotangents)
  same, to_bf16 = (lambda x: x), (lambda x: x.astype(jnp.bfloat16).astype(jnp.float64))
  chain = functools.partial(dense, rounded=rounding(to_bf16, same), answered=rounding(same, to_bf16))
  rms = lambda x: np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))
  for g, w, best in zip(got, want, truth(args, cotangents, chain), strict=True):
    assert g.dtype == (jnp.bfloat16 if g.ndim > 3 and g.shape[1] == 200 else jnp.float32)
    assert rms(np.asarray(g, np.float64) - w) < 1.1 * rms(np.asarray(best.astype(g.dtype), np.float64) - w)


def test_the_kernel_reads_nothing_beyond_a_rows_end():
  args, _ = operands(1, 200, 1, 8, phased=True)
  got = kernel(*args, interpret=pltpu.InterpretParams(uninitialized_memory="nan"))
  for g, w in zip(got, dense(*args), strict=True):
    np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5)


def test_rows_and_heads_of_the_kernel_are_apart_and_results_the_same_each_time():
  args, cotangents = operands(2, 70, 2, 128, segments=False)
  f = jax.jit(functools.partial(value_and_grads, kernel))
  want = f(args, cotangents)
  poisoned = jax.tree.map(np.copy, (args, cotangents))
  for x in (poisoned[0][0], *poisoned[1][:2]):  # what stands beside [0, :, 0] in memory
    x[1], x[0, :, 1] = np.nan, np.nan
  for x in (poisoned[0][5], poisoned[1][2]):
    x[1], x[0, 1] = np.nan, np.nan
  for i, (got, w) in enumerate(zip(f(*poisoned), want, strict=True)):
    alone = (0, 0) if i in (2, 4) else (0, slice(None), 0)
    np.testing.assert_array_equal(got[alone], w[alone])


def test_sine_and_cosine_are_exact_far_around_the_circle():
  x = np.concatenate([np.linspace(-10, 10, 10001), np.linspace(-1e5, 1e5, 100003)]).astype(np.float32)
  sin, cos = jax.jit(features.sin_cos)(x)
  np.testing.assert_allclose(sin, np.sin(x.astype(np.float64)), atol=1.5e-7)
  np.testing.assert_allclose(cos, np.cos(x.astype(np.float64)), atol=1.5e-7)


def gated(*args, activation="silu", implementation=None):
  qkvu, decay, theta, positions, ids, state = args
  return gated_lightning_attention(
    qkvu,
    decay,
    activation=activation,
    theta=theta,
    positions=positions,
    segment_ids=ids,
    initial_state=state,
    implementation=implementation,
  )


@pytest.mark.parametrize("name", ["reference", "recurrent", "xla"])
@pytest.mark.parametrize(("activation", "phased", "parts"), [("silu", True, 4), ("1+elu", False, 3)])
def test_composed_of_parts_it_is_the_definition_in_float64(name, activation, phased, parts):
  args, cotangents = operands(2, 40, 3, 6, parts=parts, phased=phased)
  got = truth(args, cotangents, functools.partial(gated, activation=activation, implementation=name))
  want = truth(args, cotangents, functools.partial(dense, activation=activation))
  assert max(relative_errors(got, want)) < 1e-13


def test_a_mesh_changes_nothing():
  args, cotangents = operands(4, 40, 4, 8, phased=True)
  want = jax.jit(functools.partial(value_and_grads, gated))(args, cotangents)
  with jax.set_mesh(make_mesh(MeshConfig(1, 2, 2, "fsdp_tp"), jax.devices()[:4])):
    got = jax.block_until_ready(jax.jit(lambda *args: gated(*args))(*args))
    grads = jax.jit(jax.grad(lambda qkvu, theta: weighed(gated(qkvu, args[1], theta, *args[3:]), cotangents), (0, 1)))
    got += jax.block_until_ready(grads(args[0], args[2]))
  for g, w in zip(got, (*want[:4], want[5]), strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)


def weighed(results, cotangents):
  return sum((x * jax.reshard(c, jax.typeof(x).sharding)).sum() for x, c in zip(results, cotangents, strict=True))


FUSED, DECAY = np.ones((2, 8, 2, 4, 4), np.float32), np.array([0.9, 1.0], np.float32)
THETA, AT = np.ones((2, 4), np.float32), np.ones((2, 8), np.int32)
WRONG = [
  ("qkvu", {"qkvu": FUSED[:, :, 0]}),
  ("qkvu", {"qkvu": FUSED[:, :, :, :2]}),
  ("activation", {"activation": "gelu"}),
  ("theta", {"theta": THETA[:, :3], "positions": AT}),
  ("positions", {"theta": THETA}),
  ("positions", {"theta": THETA, "positions": AT[:, :5]}),
  ("decay", {"decay": np.array([0.9, 1.1], np.float32)}),
  ("initial_state", {"theta": THETA, "positions": AT, "initial_state": np.ones((2, 2, 4, 4), np.float32)}),
  ("implementation", {"implementation": "pallas_tpu"}),
]


@pytest.mark.parametrize(("field", "change"), WRONG, ids=[f"{f}-{i}" for i, (f, _) in enumerate(WRONG)])
def test_bad_input_names_the_argument(field, change):
  with pytest.raises(UserError) as told:
    gated_lightning_attention(**{"qkvu": FUSED, "decay": DECAY} | change)
  assert told.value.field == field


def of_v5e(heads, d, phased):
  """The lowered call on two v5e chips that share the heads out, as text."""
  x = jax.ShapeDtypeStruct((2, 256, heads, 4, d), jnp.bfloat16)
  theta = jax.ShapeDtypeStruct((heads, d), jnp.float32) if phased else None
  positions = jax.ShapeDtypeStruct((2, 256), jnp.int32) if phased else None
  decay = np.full(heads, 0.9, np.float32)
  call = lambda x, theta, positions: gated_lightning_attention(x, decay, theta=theta, positions=positions)
  with jax.sharding.use_abstract_mesh(OF_V5E):
    return str(jax.make_jaxpr(call)(x, theta, positions))


@pytest.mark.parametrize(
  ("heads", "d", "phased", "kernel"),
  [
    (8, 128, True, "gated_lightning_attention_fwd"),
    (8, 256, True, "lightning_attention_fwd"),  # too tall with phases: the parts, and the plain kernel among them
    (10, 100, False, "gated_lightning_attention_fwd"),  # five heads a chip are few
    (80, 100, False, None),
  ],
)
def test_what_the_fused_kernel_cannot_take_goes_to_the_plain_one_where_that_can(heads, d, phased, kernel):
  names = set(re.findall(r"\w*lightning_attention_fwd", of_v5e(heads, d, phased)))
  assert names == ({kernel} if kernel else set())


def test_blocks_are_no_longer_than_the_row_needs():
  x = lambda length: jax.ShapeDtypeStruct((1, length, 8, 4, 128), jnp.bfloat16)
  block = lambda length: shape_of(x(length), None, None, "silu", pallas_tpu_gated.BLOCK).block
  assert [block(n) for n in (1, 128, 200, 1100)] == [128, 128, 256, 640]
