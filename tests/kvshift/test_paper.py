"""The paper's sizes are the paper's, and their whole training steps fit together on a pod's mesh."""

import math
import pathlib
import runpy

import jax
import pytest

from experiments.kvshift.experiment import build
from research import config
from research.fit import abstract_batch, abstract_state, jit_step
from research.mesh import abstract_mesh

PATH = str(pathlib.Path(__file__).parents[2] / "experiments/kvshift/configs/paper.py")
# billions of parameters by table 1's sizes: embedding and head included, and without them
COUNTS = {
  "1.5b": (1.57, 1.42),
  "2.9b": (2.89, 2.64),
  "6.7b": (6.77, 6.48),
  "13b": (13.06, 12.69),
  "19b": (19.01, 18.42),
}
TOKENS_A_STEP = {"1.5b": 1, "2.9b": 16, "6.7b": 1, "13b": 2, "19b": 3}  # in 2^20, as the paper's text has them


@pytest.mark.parametrize("size", runpy.run_path(PATH)["ARGS"])
def test_a_full_training_step_traces_on_256_devices(size):
  cfg = config.load(f"{PATH}:{size}")
  for arm, single in config.expand(cfg):
    mesh = abstract_mesh(single.mesh, 256)
    with jax.sharding.use_abstract_mesh(mesh):
      exp = build(single)
      state = abstract_state(exp)
      step = jit_step(exp, single, state)
      new, metrics = jax.eval_shape(step, state, abstract_batch(exp))
    kinds = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert kinds(new) == kinds(state)
    assert {"loss", "grad_norm"} <= metrics.keys()
    counts = {jax.tree_util.keystr(path): math.prod(x.shape) for path, x in jax.tree.leaves_with_path(state.model)}
    total = sum(counts.values())
    embedding = sum(n for path, n in counts.items() if path.startswith((".embed", ".head")))
    assert round(total / 1e9, 2) == pytest.approx(COUNTS[size][0], abs=0.011)
    assert round((total - embedding) / 1e9, 2) == pytest.approx(COUNTS[size][1], abs=0.011)
    # what the shift adds: four numbers a key-value head
    extra = sum(n for path, n in counts.items() if ".mix" in path)
    assert extra == (4 * single.model.kv_heads * single.model.layers if arm == "kvshift" else 0)
    # a chip's share: parameters and both moments in float32
    assert 12 * total / 256 < 2**30


@pytest.mark.parametrize("size", runpy.run_path(PATH)["ARGS"])
def test_steps_and_tokens_are_the_papers(size):
  cfg = config.load(f"{PATH}:{size}")
  assert cfg.batch * cfg.length / 2**20 == pytest.approx(TOKENS_A_STEP[size], rel=0.07)
  tokens = {"2.9b": 500e9, "19b": 200e9}.get(size, 10e9)
  assert cfg.steps * cfg.batch * cfg.length == pytest.approx(tokens, rel=1e-3)
