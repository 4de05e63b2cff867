"""Decoding costs the same after any text where the state has one size, and grows where keys and values are kept."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from experiments.transnormer import decoding
from experiments.transnormer.experiment import peer
from research.generation import Sampling, generate
from research.models.transformer import Transformer
from research.models.transnormer import TransNormer, TransNormerConfig
from tests import small

CFG = TransNormerConfig(vocab=64, width=32, layers=2, heads=4, head_dim=8, glu_width=48, precision="float32")
MODELS = {
  "transnormer": lambda: TransNormer(jax.random.key(0), CFG),
  "transformer": lambda: Transformer(jax.random.key(0), peer(CFG)),
}


def cost(model, context):
  """(FLOPs, bytes of memory moved, bytes of the cache) of one compiled step after `context` tokens."""
  cache = jax.eval_shape(functools.partial(decoding.after, model, context, 1))
  token, position = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
  compiled = jax.jit(decoding.step, donate_argnums=3).lower(model, token, position, cache).compile()
  counted = compiled.cost_analysis()
  return counted["flops"], counted["bytes accessed"], decoding.size(model, context)


def test_a_step_costs_the_same_after_any_text_only_where_the_state_has_one_size():
  with small.use():
    flops, moved, kept = np.array([cost(MODELS["transnormer"](), n) for n in (512, 4096)]).T
    assert flops[0] == flops[1]
    assert moved[0] == moved[1]
    assert kept[0] == kept[1]
    flops, moved, kept = np.array([cost(MODELS["transformer"](), n) for n in (512, 4096)]).T
  assert kept[1] == pytest.approx(8 * kept[0], rel=0.01)
  assert moved[1] - moved[0] >= kept[1] - kept[0]  # all of it is read
  products = 2 * 2 * CFG.layers * CFG.heads * CFG.head_dim  # a score and its share of the output, for each token more
  assert flops[1] - flops[0] >= products * (4096 - 512)


@pytest.mark.parametrize("name", MODELS)
def test_a_filled_cache_is_as_a_prefills(name):
  x = np.ones((1, 100), np.int32)
  with small.use():
    model = MODELS[name]()
    filled = jax.jit(lambda model: decoding.after(model, 100, 4))(model)
    real = jax.jit(lambda model: model.prefill(x, x, np.cumsum(x, axis=1) - 1, 104)[1])(model)
  shape = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
  assert shape(filled) == shape(real)
  if name == "transformer":
    assert filled.length == real.length == 100
    assert (filled.segment_ids[:, :100] == real.segment_ids[:, :100]).all()


def test_what_is_timed_is_greedy_decoding():
  with small.use():
    model = MODELS["transnormer"]()
    program = decoding.Decoding(1, 6)  # of this one nothing is filled in: the one token before is real
    made, _ = program.run(model, program.fill(model))
    expected = generate(model, [[1, 0]], tokens=5, sampling=Sampling(temperature=0))
  assert np.ravel(made).tolist() == [0, *expected[0]]
