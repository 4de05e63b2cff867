"""The published sizes have their published parameters, and their whole training steps fit together on a pod's mesh."""

import math
import pathlib
import runpy

import jax
import pytest

from experiments.transnormer.experiment import build
from research import config
from research.fit import abstract_batch, abstract_state, jit_step
from research.mesh import abstract_mesh

PATH = str(pathlib.Path(__file__).parents[2] / "experiments/transnormer/configs/paper.py")
SIZES = runpy.run_path(PATH)["ARGS"]
# As published, and by how much the sum L (5 d^2 + 3 d g) + 50272 d + L d / 2 misses it: it is exact but for 385M, whose
# 36,864 = 36 * 1024 stay unexplained. 65B and 175B have a name only.
PUBLISHED = {
  "385m": (384_974_848, 36_864),
  "1b": (992_165_888, 0),
  "3b": (2_876_006_400, 0),
  "7b": (6_780_547_072, 0),
  "13b": (12_620_195_840, 0),
}
ROUNDED = {"65b": (65e9, 0.03), "175b": (175e9, 0.01), "15b": (14.83e9, 0.0005)}  # and how far off, at most


def counts(arm_config, devices):
  with jax.sharding.use_abstract_mesh(abstract_mesh(arm_config.mesh, devices)):
    state = abstract_state(build(arm_config))
  return sum(math.prod(x.shape) for x in jax.tree.leaves(state.model))


@pytest.mark.parametrize("size", SIZES)
def test_a_full_training_step_traces_on_512_devices(size):
  arms = "transnormer,transformer" if size == "385m" else "transnormer"
  cfg = config.load(f"{PATH}:{size}", ["model.layer_loop=scan", f"only={arms}"])  # scan: as on a pod
  for _, single in config.expand(cfg):
    with jax.sharding.use_abstract_mesh(abstract_mesh(single.mesh, 512)):
      exp = build(single)
      state = abstract_state(exp)
      new, metrics = jax.eval_shape(jit_step(exp, single, state), state, abstract_batch(exp))
    kinds = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert kinds(new) == kinds(state)
    assert {"loss", "grad_norm"} <= metrics.keys()


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_the_published_ones_and_the_transformers_within_one_percent(size):
  cfg = config.load(f"{PATH}:{size}")
  count = {arm: counts(single, 512) for arm, single in config.expand(cfg)}
  ours, model = count["transnormer"], cfg.model
  assert count["transformer"] == pytest.approx(ours, rel=0.01)
  if size in PUBLISHED:
    published, off = PUBLISHED[size]
    # Published: phases for every second channel of every layer. Released code, and here: for all of the first layer.
    phases = model.layers * model.width // 2 - model.width
    assert abs(ours + phases - published) == off
  else:
    published, within = ROUNDED[size]
    assert ours == pytest.approx(published, rel=within)


@pytest.mark.parametrize("size", SIZES)
def test_a_step_has_four_million_tokens(size):
  cfg = config.load(f"{PATH}:{size}")
  assert cfg.batch * cfg.length == 2**22
  assert cfg.steps * 2**22 == pytest.approx({"385m": 1e12, "1b": 1.2e12, "15b": 2e12}.get(size, 1.4e12), rel=1e-3)


def test_a_share_of_the_largest_fits_a_chip_of_4096():
  cfg = config.load(f"{PATH}:175b", ["only=transnormer"])
  single = config.expand(cfg)[0][1]
  assert counts(single, 4096) * 12 / 4096 < 2**30  # bytes of parameters and both moments in float32
