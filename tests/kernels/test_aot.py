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


@pytest.mark.slow
def test_cross_entropy_scatters_the_head_gradient_and_holds_no_full_logits():
  temp, scatters = map(int, compiles(CROSS_ENTROPY, GENERATIONS["v5e"])[0].split())
  assert temp < 0.5 * 4 * (2 * 2048) * (50304 // 2)
  # An all-reduce of dw that is then cut along `data` is one reduce-scatter to the TPU compiler.
  assert scatters == 1
