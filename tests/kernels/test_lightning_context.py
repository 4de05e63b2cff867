"""Rows cut along their length over a mesh are the same as whole ones, and devices exchange nothing but states."""

import functools
import math

import jax
from jax import P
from jax import numpy as jnp
import numpy as np
import pytest

from launch import counts, hlo
from research.errors import UserError
from research.kernels.lightning_attention import context_parallel
from research.kernels.lightning_attention.api import lightning_attention
from research.mesh import MeshConfig, make_mesh
from tests.kernels.test_lightning_attention import LOCAL, operands, relative_errors, truth, value_and_grads

MESHES = {
  "data": ((1, 4, 1), P(None, "data")),
  "data, heads by model": ((1, 2, 2), P(None, "data", "model")),
  "data, rows by replica": ((2, 2, 1), P("replica", "data")),
  "model, rows by data": ((1, 2, 2), P("data", "model")),
  "data and model": ((1, 2, 2), P(None, ("data", "model"))),
}


def use(shape):
  return jax.set_mesh(make_mesh(MeshConfig(*shape, "fsdp_tp"), jax.devices()[: math.prod(shape)]))


def cut(mesh, args, cotangents, f=None):
  """(value and gradients of operands that stand cut along their length, [(collective, bytes of its operands)]).

  f: an implementation that is not of this platform.
  """
  shape, spec = MESHES[mesh]

  def call(q, k, v, decay, ids, state):
    if f is None:
      return lightning_attention(q, k, v, decay, segment_ids=ids, initial_state=state)
    return context_parallel.attention(f, where, q, k, v, decay, ids, state)

  with use(shape):
    where = context_parallel.layout(jax.device_put(args[0], spec))
    specs = where.qkv, where.qkv, where.qkv, where.decay, where.tokens, where.state
    args = [None if x is None else jax.device_put(x, spec) for x, spec in zip(args, specs, strict=True)]
    cotangents = jax.device_put(cotangents, (where.qkv, where.state))
    compiled = jax.jit(functools.partial(value_and_grads, call)).lower(args, cotangents).compile()
    values = jax.block_until_ready(compiled(args, cotangents))
  sent = []
  for computation in hlo.parse(compiled.as_text())[0].values():
    for instruction in computation.instructions.values():
      if instruction.opcode.removesuffix("-start") in counts.COLLECTIVES:
        arrays = [a for name in instruction.operands for a in computation.instructions[name].types]
        sent.append((instruction.opcode, sum(a.bytes for a in arrays)))
  return values, sorted(sent)


@pytest.mark.parametrize("mesh", MESHES)
def test_rows_cut_along_their_length_are_whole_ones_and_nothing_but_states_is_exchanged(mesh):
  # 44 tokens: shards that are no multiple of a chunk, and documents across their borders; heads of all decays
  args, cotangents = operands(4, 44, 6, 8, 6)
  got, sent = cut(mesh, args, cotangents)
  assert max(relative_errors(got, truth(args, cotangents))) < 1e-6
  state = got[1].addressable_shards[0].data
  # the ids at the ends of a shard and how often they change in it, forward; a state forward, and one back
  assert sent == [("all-gather", 4 * 3 * len(state)), ("all-gather", state.nbytes), ("all-gather", state.nbytes)]


@pytest.mark.parametrize("name", LOCAL)
def test_any_implementation_runs_the_parts(name):
  args, cotangents = operands(2, 2 * 37, 2, 8, 6, segments=name != "pallas_gpu")
  got, _ = cut("data, rows by replica", args, cotangents, LOCAL[name])
  assert max(relative_errors(got, truth(args, cotangents))) < 2e-6


@pytest.mark.parametrize("segments", [True, False])
def test_in_float64_they_are_equal_to_rounding(segments):
  args, cotangents = operands(1, 60, 4, 5, 3, dtype=np.float64, segments=segments)
  with jax.enable_x64(True):
    got, _ = cut("data", *jax.tree.map(jnp.asarray, (args, cotangents)))
  assert max(relative_errors(got, truth(args, cotangents))) < 1e-13


def test_in_bfloat16_they_are_as_good_as_whole_ones():
  args, (dout, dstate) = operands(1, 400, 2, 32, 32)
  low = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16))
  args, cotangents = (*map(low, args[:3]), *args[3:]), (low(dout), dstate)
  rms = lambda x: np.sqrt(np.mean(np.square(x)))
  for g, w in zip(cut("data", args, cotangents)[0], truth(args, cotangents), strict=True):
    best = rms(np.asarray(low(w), np.float64) - w) if g.dtype == jnp.bfloat16 else 1e-5 * rms(w)
    assert rms(np.asarray(g, np.float64) - w) < 1.01 * best


DOCUMENTS = {
  "one": [0] * 16,
  "shards": [3, 3, 3, 3, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0],
  "over three": [5, 5, 5, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 9, 9, 9],
  "to a border": [5, 5, 5, 5, 5, 5, 5, 5, 2, 2, 2, 2, 2, 2, 2, 1],
  "single tokens": list(range(16)),
  "inside": [0, 1, 1, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6, 6, 7, 7],
}


def test_a_state_passes_the_documents_that_go_on_and_no_other():
  (q, k, v, decay, _, state), cotangents = operands(len(DOCUMENTS), 16, 3, 4, 3)
  args = q, k, v, decay, np.int32([*DOCUMENTS.values()]), state
  assert max(relative_errors(cut("data", args, cotangents)[0], truth(args, cotangents))) < 1e-6


def test_without_ids_or_a_state_or_with_a_token_a_device_they_are_whole_ones():
  (q, k, v, decay, *_), cotangents = operands(2, 4, 3, 4, 3, segments=False)
  mesh, spec = MESHES["data"]
  with use(mesh):
    got = jax.jit(lambda q: lightning_attention(jax.reshard(q, spec), k, v, decay))(q)
  want = truth((q, k, v, decay, None, np.zeros((2, 3, 4, 3), np.float32)), cotangents)
  assert max(relative_errors(got, want[:2])) < 1e-6


def test_a_layer_between_residual_streams_cut_along_their_length_is_the_whole_one():
  rng = np.random.default_rng(0)
  x, ids = rng.standard_normal((2, 48, 12)).astype(np.float32), np.repeat(np.int32([[0, 1, 2]]), 16, axis=1)
  weights = (
    rng.standard_normal((3, 12, 4, 6)).astype(np.float32) / 4,
    rng.standard_normal((4, 6, 12)).astype(np.float32),
  )
  decay = np.float32([1, 0.9, 0.5, 0.1])

  def loss(x, weights, ids):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, w) for w in weights[0])
    y, _ = lightning_attention(q, k, v, decay, segment_ids=ids)
    stream = jax.typeof(x).sharding if jax.typeof(x).sharding.mesh.axis_names else None
    return ((x + jnp.einsum("bthk,hkd->btd", y, weights[1], out_sharding=stream)) ** 2).mean()

  f = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  want = jax.tree.leaves(f(x, weights, np.broadcast_to(ids, (2, 48))))
  with use((2, 2, 1)):
    put = lambda x: jax.device_put(x, P("replica", "data"))
    got = jax.block_until_ready(f(put(x), jax.device_put(weights, P()), put(np.broadcast_to(ids, (2, 48)))))
  assert got[1][0].sharding.spec == P("replica", "data", None)
  assert max(relative_errors(jax.tree.leaves(got), map(np.asarray, want))) < 1e-5


@pytest.mark.parametrize(
  ("mesh", "shape", "told"),
  [
    ("data, heads by model", (1, 8, 3, 4), "heads=3: mesh.model=2 cuts them"),
    ("data, rows by replica", (3, 8, 2, 4), "batch=3: mesh.replica=2 cuts them"),
    ("model, rows by data", (1, 8, 2, 4), "batch=1: mesh.replica x mesh.data=2 cuts them"),
  ],
)
def test_what_the_axes_that_are_left_do_not_divide_is_told(mesh, shape, told):
  with use(MESHES[mesh][0]):
    q = jax.device_put(np.ones(shape, np.float32), P(None, *MESHES[mesh][1][1:2]))
    with pytest.raises(UserError, match=told):
      lightning_attention(q, q, q, np.full(shape[2], 0.9, np.float32))


def test_a_length_that_the_axis_does_not_divide_is_refused_by_jax_before_it_gets_here():
  with use((1, 4, 1)), pytest.raises(ValueError, match="partitioned 4 times, but does not evenly divide .* size 6"):
    jax.device_put(np.ones((1, 6, 2, 4), np.float32), P(None, "data"))
