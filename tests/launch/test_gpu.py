"""Plans for H100 nodes, and Triton kernels in them, by XLA's GPU compiler without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.launch.test_plan import planned

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs the GPU compiler: pip install -e .[aot-cuda]"
)

TRITON = """
import json
from launch import ptx, topology
from launch.counts import count
topology.environment()
import jax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

def product(x, w, out):
  out[...] = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)

def f(x, w):
  rows = pl.BlockSpec((64, 128), lambda i: (i, 0))
  call = pl.pallas_call(
    product, out_shape=jax.ShapeDtypeStruct((256, 128), jnp.float32), grid=(4,), name="a_product",
    in_specs=[rows, pl.BlockSpec((128, 128), lambda i: (0, 0))], out_specs=rows,
    compiler_params=triton.CompilerParams(num_warps=4))
  return call(x, w)

with ptx.dumped():
  [device] = topology.devices(topology.parse("h100:1"))
  on = jax.sharding.SingleDeviceSharding(device)
  put = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=on)
  text = jax.jit(f).trace(put(256, 128), put(128, 128)).lower(lowering_platforms=("cuda",)).compile().as_text()
  counts = count(text, {"data": 1})
  print(json.dumps([counts.kernels, ptx.registers(list(counts.kernels)), counts.uncounted]))
"""


LIGHTNING = """
import json, sys
from launch import planner, ptx, topology
from launch.counts import count
topology.environment()
import jax
from jax import numpy as jnp
from research.kernels.lightning_attention import pallas_gpu

d_k, d_v, dtype = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def step(q, k, v, decay, ids, state, cotangents):
  value, vjp = jax.vjp(lambda q, k, v, state: pallas_gpu.attention(q, k, v, decay, ids, state), q, k, v, state)
  return value, vjp(cotangents)

with ptx.dumped():
  [device] = topology.devices(topology.parse("h100:1"))
  on = jax.sharding.SingleDeviceSharding(device)
  put = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=on)
  q, v, state = put(4, 1000, 8, d_k), put(4, 1000, 8, d_v), put(4, 8, d_k, d_v, dtype=jnp.float32)
  args = q, q, v, put(8, dtype=jnp.float32), put(4, 1000, dtype=jnp.int32), state, (v, state)
  text = jax.jit(step).trace(*args).lower(lowering_platforms=("cuda",)).compile().as_text()
  counts = count(text, {"data": 1}, kernel_flops=planner.kernel_flops)
  print(json.dumps([ptx.registers(list(counts.kernels)), counts.flops, counts.uncounted]))
"""


def compiles(program, *args):
  command = [sys.executable, "-c", program, *map(str, args)]
  done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout)


def spills_nothing(*args):
  kernels, flops, uncounted = compiles(LIGHTNING, *args)
  assert len(kernels) == 4
  assert not uncounted
  # four sweeps, and of each at least the recurrence
  d_k, d_v, _ = args
  assert flops > 4 * 4 * 1000 * 8 * 4 * d_k * d_v
  for registers, spilled in kernels.values():
    assert registers <= 255
    assert spilled == 0


@pytest.mark.parametrize(("d_k", "d_v", "dtype"), [(128, 128, "bfloat16"), (64, 64, "float32")])
def test_lightning_attention_spills_no_register(d_k, d_v, dtype):
  spills_nothing(d_k, d_v, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("d_k", "d_v"), [(16, 16), (64, 64), (96, 96), (128, 128), (256, 128), (64, 256), (256, 256)])
def test_lightning_attention_of_any_head_dim_spills_no_register(d_k, d_v, dtype):
  spills_nothing(d_k, d_v, dtype)


def test_registers_and_spills_of_a_triton_kernel_are_read():
  kernels, registers, uncounted = compiles(TRITON)
  assert kernels == {"a_product": 1}
  used, spilled = registers["a_product"]
  assert 32 < used <= 255
  assert spilled == 0
  assert uncounted == ["kernel a_product: its FLOPs are not known"]


def test_a_training_step_on_a_node_computes_what_it_does_on_a_pod():
  [found] = planned("--topology=h100:4")
  assert found["fits"]
  assert 1.0 < 4 * found["counts"]["flops"] / found["model_flops"] < 1.5
  assert ["data"] in [c["axes"] for c in found["counts"]["collectives"]]
