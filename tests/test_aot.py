"""The whole training step, compiled by the real TPU compiler for chips that are not here."""

import importlib.util

import pytest

from launch.kernels import GENERATIONS
from tests.kernels.test_aot import compiles

STEP = """
from research import config
from research.fit import abstract_batch, abstract_state, jit_step

overrides = ["only=kvshift", "seeds=0", "model.precision=bfloat16", "model.layers=4", "length=1024", "batch=16"]
overrides += ["model.width=512", "model.heads=8", "model.kv_heads=4", "model.head_dim=64", "model.mlp_width=1024"]
[(_, cfg)] = config.expand(config.load("experiments/kvshift/configs/main.py", overrides + names))
with jax.set_mesh(mesh):
  exp = config.experiment_module(cfg.experiment).build(cfg)
  state = jax.tree.map(lambda x: put(x.shape, x.dtype, *x.sharding.spec), abstract_state(exp))
  batch = jax.tree.map(lambda x: put(x.shape, x.dtype, *x.sharding.spec), abstract_batch(exp))
  step = jit_step(exp, cfg, state)
  compiled = step.lower(state, batch).compile()
print("kernels", compiled.as_text().count("tpu_custom_call"))
memory = compiled.memory_analysis()
print("donated", memory.alias_size_in_bytes / memory.output_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the compiler for TPUs: pip install -e .[aot]"
)
@pytest.mark.parametrize("overrides", [["model.remat=dots", "accumulate=2"], ["tx.name=muon"]], ids=" ".join)
def test_the_step_compiles_for_a_pod_with_fused_attention_and_donated_state(overrides):
  kernels, donated = (line.split()[1] for line in compiles(STEP, GENERATIONS["v5e"], *overrides))
  assert int(kernels) >= 3  # splash: forward, dq, dkv, inside the scan over layers
  assert float(donated) > 0.99
