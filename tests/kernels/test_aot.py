"""Real TPU compiles on this machine: libtpu compiles for pods that it only has a description of."""

import importlib.util
import os
import subprocess
import sys

import pytest

from launch.kernels import GENERATIONS
from research.kernels.attention.cases import CASES

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the compiler for TPUs: pip install -e .[aot]"
)

PREAMBLE = """
import sys
from launch import topology
topology.environment()
import jax
import jax.numpy as jnp
from research.mesh import BATCH, MeshConfig

name, *names = sys.argv[1:]
mesh = topology.make_mesh(MeshConfig(1, -1, 2), topology.parse(name))

def put(shape, dtype, *spec):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))
"""

ATTENTION = """
from research.kernels.attention.api import attention
from research.kernels.attention.cases import CASES

with jax.set_mesh(mesh):
  for name in names:
    case = CASES[name]
    batch = case.batch * mesh.shape["data"]
    heads = lambda n: put((batch, case.length, 2 * n, case.head_dim), case.dtype, BATCH, None, "model", None)
    ids = put((batch, case.length), jnp.int32, BATCH, None)
    loss = lambda q, k, v, ids: attention(q, k, v, segment_ids=ids).astype(jnp.float32).sum()
    args = heads(case.heads), heads(case.kv_heads), heads(case.kv_heads), ids
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile().as_text()
    print(name, "kernels", text.count("tpu_custom_call"), "collectives", text.count("all-"))
"""

GATED = """
from research.kernels.lightning_attention.gated import FUSED, gated_lightning_attention

with jax.set_mesh(mesh):
  for name in names:
    length, heads, parts, d, phased, dtype = eval(name)
    batch = mesh.shape["data"]
    qkvu = put((batch, length, 2 * heads, parts, d), dtype, *FUSED)
    theta = put((2 * heads, d), jnp.float32, "model", None) if phased else None
    ids = put((batch, length), jnp.int32, BATCH, None)

    def loss(qkvu, theta, ids):
      decay = jnp.full(qkvu.shape[2], 0.9)
      out, squares, _ = gated_lightning_attention(qkvu, decay, theta=theta, positions=ids, segment_ids=ids)
      return out.astype(jnp.float32).sum() + squares.sum()

    args = (0, 1) if phased else 0
    text = jax.jit(jax.grad(loss, argnums=args)).lower(qkvu, theta, ids).compile().as_text()
    print(name, "kernels", text.count("tpu_custom_call"))
"""

LAYER = """
import re
from launch.counts import count
from research.mesh import PARTITIONS
from research.nn.linear_attention import GatedLinearAttention
from research.nn.precision import POLICIES

HEADS, DIM, LENGTH = 32, 128, 8192
WIDTH = HEADS * DIM
mesh = topology.make_mesh(MeshConfig(1, 1, 1), topology.parse("v5e:1x1"))

# Bytes of everything in the compiled layer, as if all arrays were in HBM and fetched when they are used.
def moved(length, train):
  make = lambda: GatedLinearAttention(
    jax.random.key(0), width=WIDTH, heads=HEADS, head_dim=DIM, lrpe=False, gate=True, activation="silu", norm="srms",
    norm_eps=1e-6, partition=PARTITIONS["fsdp_tp"](), policy=POLICIES["bfloat16"],
  )
  layer = jax.tree.map(lambda x: put(x.shape, x.dtype, *x.sharding.spec), jax.eval_shape(make))
  x, ids = put((1, length, WIDTH), jnp.bfloat16, BATCH), put((1, length), jnp.int32, BATCH)
  forward = lambda layer, x, ids: layer(x, ids, ids, jnp.full(HEADS, 0.9))[0]

  def step(layer, x, ids, dy):
    y, pull = jax.vjp(lambda layer, x: forward(layer, x, ids), layer, x)
    return y, pull(dy)

  args = (layer, x, ids, x) if train else (layer, x, ids)
  text = jax.jit(step if train else forward).lower(*args).compile().as_text()
  text = re.sub(r"S\\(\\d+\\)", "", text)
  return count(re.sub(r" (copy|slice)-start\\(", " bitcast(", text), {}).bytes

with jax.set_mesh(mesh):
  inner, width = 2 * HEADS * DIM, 2 * WIDTH  # bytes a token
  forward = (width + 4 * inner) + (inner + width)
  products = {False: forward, True: forward + (width + inner) * 2 + (width + 4 * inner) * 2}
  least = {False: (4 + 1) * inner, True: (4 + 1) * inner + (4 + 1 + 4) * inner}
  for train in (False, True):
    # a difference: weights do not grow with length
    a_token = (moved(2 * LENGTH, train) - moved(LENGTH, train)) / LENGTH
    print((a_token - products[train]) / least[train])
"""

CROSS_ENTROPY = """
from research.kernels.cross_entropy.api import cross_entropy

with jax.set_mesh(mesh):
  x, w = put((4, 2048, 768), jnp.bfloat16, BATCH, None, None), put((768, 50304), jnp.float32, "data", "model")
  targets, weights = put((4, 2048), jnp.int32, BATCH, None), put((4, 2048), jnp.float32, BATCH, None)

  def mean(x, w, targets, weights):
    return cross_entropy(x, w.astype(jnp.bfloat16), targets, weights) / weights.sum()

  compiled = jax.jit(jax.grad(mean, argnums=(0, 1))).lower(x, w, targets, weights).compile()
print(compiled.memory_analysis().temp_size_in_bytes, compiled.as_text().count("%all-reduce-scatter ("))
"""


LIGHTNING = """
from launch.counts import count
from research.kernels.lightning_attention.api import lightning_attention

with jax.set_mesh(mesh):
  for name in names:
    d_k, d_v, dtype, kind = name.split()
    cut = "data" if kind == "context" else None
    rows = None if cut else BATCH
    heads = lambda d: put((8, 1000, 4, int(d)), dtype, rows, cut, "model", None)
    state = put((8, 4, int(d_k), int(d_v)), jnp.float32, rows, "model", None, None)
    ids = None if kind == "plain" else put((8, 1000), jnp.int32, rows, cut)

    def loss(q, k, v, state, decay, ids):
      out, state = lightning_attention(q, k, v, decay, segment_ids=ids, initial_state=state)
      return out.astype(jnp.float32).sum() + state.sum()

    args = heads(d_k), heads(d_k), heads(d_v), state, put((4,), jnp.float32, "model"), ids
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*args).compile().as_text()
    counts = count(text, dict(mesh.shape))
    states = 1e-6 * sum(c.sent for c in counts.collectives)
    kinds = sorted({(c.kind, *c.axes) for c in counts.collectives})
    print(name, "fused" if 1 < sum(counts.kernels.values()) < 4 else counts.kernels, kinds, f"{states:.2f} MB")
"""
DIMS = ["64 64", "96 96", "128 128", "256 256", "256 128", "64 128"]
LIGHTNING_CASES = [
  f"{d} {dtype} {kind}" for d in DIMS for dtype in ("bfloat16", "float32") for kind in ("plain", "packed")
]


def compiles(program, *args):
  env = os.environ | {"JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-c", PREAMBLE + program, *args]
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=550)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout.splitlines()


@pytest.mark.parametrize("generation", ["v5e", "v5p"])
def test_attention_compiles_to_three_kernels_and_no_collective(generation):
  # forward, dq, dkv
  assert compiles(ATTENTION, GENERATIONS[generation], "nano") == ["nano kernels 3 collectives 0"]


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_case_compiles_for_every_generation(generation):
  assert compiles(ATTENTION, GENERATIONS[generation], *CASES) == [f"{name} kernels 3 collectives 0" for name in CASES]


@pytest.mark.parametrize("generation", ["v5e", "tpu7x"])
def test_lightning_attention_compiles_to_its_kernels_and_no_collective(generation):
  names = ["64 64 bfloat16 packed", "256 128 bfloat16 plain"]
  assert compiles(LIGHTNING, GENERATIONS[generation], *names) == [f"{name} fused [] 0.00 MB" for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_lightning_attention_of_every_head_dim_compiles_for_every_generation(generation):
  told = compiles(LIGHTNING, GENERATIONS[generation], *LIGHTNING_CASES)
  assert told == [f"{name} fused [] 0.00 MB" for name in LIGHTNING_CASES]


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_rows_cut_along_their_length_are_kernels_that_gather_two_states(generation):
  name = "128 128 bfloat16 context"
  [told] = compiles(LIGHTNING, GENERATIONS[generation], name)
  shards = {"v4": 4, "tpu7x": 4}.get(generation, 2)
  # 8 rows and 2 heads a device, forward and back
  sent = 1e-6 * 2 * (shards - 1) * 8 * 2 * 128 * 128 * 4
  assert told == f"{name} fused [('all-gather', 'data')] {sent:.2f} MB"


GATED_CASES = [
  "(2048, 8, 4, 128, False, 'bfloat16')",
  "(2048, 8, 4, 128, True, 'bfloat16')",
  "(1000, 12, 4, 64, False, 'bfloat16')",
  "(1000, 3, 4, 64, True, 'float32')",
  "(1000, 4, 3, 96, True, 'bfloat16')",
  "(1000, 4, 4, 256, False, 'float32')",
]


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_gated_lightning_attention_compiles_to_two_kernels_for_every_generation(generation):
  lines = compiles(GATED, GENERATIONS[generation], *GATED_CASES)
  assert lines == [f"{case} kernels 2" for case in GATED_CASES]


def test_a_layer_of_gated_attention_moves_hardly_more_than_it_must():
  """Of a 7B model, on one v5e: what is moved beside the projections' own operands, results and weights.

  At least: q, k, v, u read and the gated output written; then these, and the output's gradient, read, and
  theirs written. More: the states kept for the way back, and one reading of the output for the norm's gradient.
  """
  forward, both = map(float, compiles(LAYER, GENERATIONS["v5e"]))
  assert 1 <= forward <= 1.15
  assert 1 <= both <= 1.15


@pytest.mark.slow
def test_cross_entropy_scatters_the_head_gradient_and_holds_no_full_logits():
  temp, scatters = map(int, compiles(CROSS_ENTROPY, GENERATIONS["v5e"])[0].split())
  assert temp < 0.5 * 4 * (2 * 2048) * (50304 // 2)
  # An all-reduce of dw that is then cut along `data` is one reduce-scatter to the TPU compiler.
  assert scatters == 1
