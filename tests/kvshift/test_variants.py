"""Every attention of the experiment is causal, keeps documents apart, and costs the coefficients it says."""

import math

import jax
from jax import P
from jax import numpy as jnp
import numpy as np
import pytest

from experiments.kvshift import variants
from experiments.kvshift.attention import KVShift, mix
from experiments.kvshift.experiment import ATTENTIONS
from research.mesh import BATCH, PARTITIONS, MeshConfig, to_devices
from research.models.decoder import next_token_loss
from research.models.transformer import Transformer
from tests import small

MIXES = {name: mix for name, mix in ATTENTIONS.items() if mix is not None}
PARTITION = PARTITIONS["replicated"]()
Q, K, V = (jax.random.normal(jax.random.key(i), (2, 12, n, 8)) for i, n in enumerate((4, 2, 2)))
SEGMENTS = jnp.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12])


def made(name, seed=0):
  with small.use():
    return MIXES[name](jax.random.key(seed), small.MODEL, PARTITION)


@pytest.mark.parametrize("name", MIXES)
def test_row_t_depends_on_no_later_row_no_other_document_and_no_farther_back_than_it_says(name):
  module = made(name)
  with small.use():
    out = jax.jit(lambda *x: module(*x, SEGMENTS))
    before = out(Q, K, V)
    for t in (3, 6):
      # row t of all three; NaN would spread through any product
      changed = [x.at[:, t].set(jnp.nan) for x in (Q, K, V)]
      for name, a, b in zip("qkv", before, out(*changed), strict=True):
        differs = np.asarray((a != b).any(axis=(2, 3)))
        back = module.looks_back.get(name, 0)
        for row, at in np.argwhere(differs):
          assert t <= at <= t + back
          assert SEGMENTS[row, at] == SEGMENTS[row, t]
        assert differs[1, t]
        assert differs[1, t + back]  # it does look as far as it says


@pytest.mark.parametrize("window", [2, 3, 4])
def test_the_sum_is_the_one_written_down(window):
  c = np.asarray(jax.random.normal(jax.random.key(9), (2, 1, window)))
  expected = np.zeros(K.shape)
  for row, t, i in np.ndindex(2, 12, window):
    if t >= i and SEGMENTS[row, t - i] == SEGMENTS[row, t] and (SEGMENTS[row, t - i : t + 1] == SEGMENTS[row, t]).all():
      expected[row, t] += c[:, :, window - 1 - i] * np.asarray(K)[row, t - i]
  np.testing.assert_allclose(variants.window_sum(K, jnp.asarray(c), SEGMENTS), expected, atol=1e-5)


def test_a_window_of_two_is_kv_shifting():
  with small.use():
    module = KVShift(jax.random.key(0), small.MODEL, PARTITION)
    k, v = (variants.window_sum(x, c[...][:, None], SEGMENTS) for x, c in ((K, module.key), (V, module.value)))
    _, k_shifted, v_shifted = module(Q, K, V, SEGMENTS)
  np.testing.assert_allclose(k, k_shifted, atol=1e-6)
  np.testing.assert_allclose(v, v_shifted, atol=1e-6)


def coefficients(name, which="k", heads=4000):
  """Coefficients [heads, window] at the start, as they are used."""
  settings = MIXES[name].keywords
  c = settings["init"](jax.random.key(1), (heads, 1, settings["window"]))
  return np.asarray(c if settings.get("limit") is None else settings["limit"](c))[:, 0]


def test_starts_have_the_laws_they_claim():
  for name in ("gate", "clip", "konly"):  # the paper's: current ~ U(0, 1), previous the rest
    c = coefficients(name)
    np.testing.assert_allclose(c.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(np.quantile(c[:, 1], (0.1, 0.5, 0.9)), (0.1, 0.5, 0.9), atol=0.03)
  for name in ("window3", "window4"):
    c = coefficients(name)
    np.testing.assert_allclose(c.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(c[:, 1:].mean(0), 0.5, atol=0.03)
    assert (c[:, 0] < 0).mean() > 0.4
  for name in ("conv", "canon"):
    np.testing.assert_allclose(coefficients(name).mean(0), 0, atol=0.02)
    np.testing.assert_allclose(coefficients(name).std(), 0.2887, atol=0.01)


def test_limits_hold_whatever_training_does():
  wild = 10 * jax.random.normal(jax.random.key(0), (50, 1, 1))
  c = np.asarray(variants.gate(wild))
  np.testing.assert_allclose(c.sum(-1), 1, atol=1e-6)
  assert ((c >= 0) & (c <= 1)).all()
  c = np.asarray(variants.clip(wild))
  assert ((c >= 0) & (c <= 1)).all()


def test_identity_coefficients_are_plain_attention_bit_for_bit():
  q, k, v = made("identity")(Q, K, V, SEGMENTS)
  assert (q == Q).all()
  assert (k == K).all()
  assert (v == V).all()


@pytest.mark.parametrize(
  ("name", "extra"),
  [("kvshift", 8), ("gate", 4), ("konly", 4), ("window4", 16), ("qkv", 16), ("conv", 128), ("canon", 256)],
)
def test_parameters_are_equal_but_for_the_coefficients(name, extra):
  count = lambda mix: sum(
    math.prod(x.shape)
    for x in jax.tree.leaves(
      jax.eval_shape(lambda key: Transformer(key, small.MODEL, mix=mix), jax.eval_shape(lambda: jax.random.key(0)))
    )
  )
  with small.use():
    assert count(MIXES[name]) - count(None) == extra * small.MODEL.layers


@pytest.mark.parametrize("name", ["kvshift", "qkv", "canon"])
def test_four_devices_mix_and_differentiate_as_one(name):
  """Rows cut along the batch, heads along `model`: the mix alone, whose gradients add up over both."""
  mesh = MeshConfig(1, 2, 2, "fsdp_tp")

  def objective(module, q, k, v, ids):
    out = module(q, k, v, ids)
    return sum(jnp.sum(jnp.sin(x) * (i + 1)) for i, x in enumerate(out))

  def found(mesh, devices):
    with small.use(mesh, devices):
      place = lambda x, *spec: jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), P(*spec)))
      module = MIXES[name](jax.random.key(0), small.MODEL, PARTITIONS[mesh.partition]())
      rows = [place(np.asarray(x), BATCH, None, "model", None) for x in (Q, K, V)]
      ids = place(np.asarray(SEGMENTS), BATCH, None)
      return small.leaves(jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2, 3)))(module, *rows, ids))

  for a, b in zip(found(mesh, 4), found(MeshConfig(), 1), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one document", "packed"])
def test_the_gradient_written_out_is_the_one_of_the_sum(segments):
  with jax.enable_x64(True):
    x, weights = (np.asarray(jax.random.normal(jax.random.key(i), K.shape), np.float64) for i in (4, 5))
    c = np.random.default_rng(0).normal(size=(2, 2))
    ours = jax.grad(lambda x, c: jnp.sum(weights * mix(x, c, segments)), argnums=(0, 1))(x, c)
    sums = jax.grad(lambda x, c: jnp.sum(weights * variants.window_sum(x, c[:, None], segments)), argnums=(0, 1))(x, c)
  for a, b in zip(ours, sums, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_model_learns_from_batches_of_one_row(name):
  """Of one row, jax forgets where slices stand: gradients that are written out have to agree with their operands."""
  with small.use():
    model = Transformer(jax.random.key(0), small.MODEL, "fsdp_tp", ATTENTIONS[name])
    batch = to_devices(small.batch(rows=1))
    value = lambda model: next_token_loss(model, batch, jax.random.key(0))["loss"].total
    gradient = jax.eval_shape(jax.jit(jax.grad(value)), model)
    assert jax.tree.structure(gradient) == jax.tree.structure(model)
