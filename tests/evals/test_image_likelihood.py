"""Likelihoods of images under classes, where every image of a small world can be written down."""

import itertools

import jax
import numpy as np
import pytest

from research.errors import UserError
from research.evals import image_likelihood
from research.evals.image_likelihood import log_likelihoods, measures, of_every_class
from research.mesh import MeshConfig, on_devices
from research.models.llamagen import LlamaGen, LlamaGenConfig
from tests import small
from tests.models import images

MODEL = LlamaGenConfig(
  vocab=4, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp_width=16, classes=3, tokens=4, precision="float32"
)
WORLD = np.array(list(itertools.product(range(4), repeat=4)))  # all 256 images


def make(seed=1, partition="fsdp_tp"):
  """A model of random parameters under the current mesh, without the compile that its own would take."""
  model = on_devices(jax.eval_shape(lambda: LlamaGen(jax.random.key(0), MODEL, partition)))
  rng = np.random.default_rng(seed)
  numbers = lambda x: rng.normal(size=x.shape).astype(x.dtype)
  return jax.tree.map(lambda x: jax.device_put(numbers(x), x.sharding), model)


def test_probabilities_of_all_images_add_up_to_one_under_each_class():
  with small.use():
    model = make()
    log_p = of_every_class(model, WORLD)
    logits = jax.jit(lambda model, *x: model.logits(*x))(model, WORLD.astype(np.int32), np.full(256, 1, np.int32))
  assert (log_p.shape, log_p.dtype) == ((256, 4), np.float64)
  np.testing.assert_allclose(np.exp(log_p).sum(0), 1, rtol=1e-5)
  dense = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), WORLD[..., None], axis=-1)[..., 0].sum(1)
  np.testing.assert_allclose(log_p[:, 1], dense, rtol=1e-5)


def test_rows_do_not_depend_on_how_they_are_batched_or_on_how_many_devices():
  labels = np.arange(256) % 4
  with small.use():
    whole = log_likelihoods(make(), WORLD, labels)
    np.testing.assert_allclose(log_likelihoods(make(), WORLD[:9], labels[:9], batch=4), whole[:9], rtol=1e-5)
  with small.use(MeshConfig(1, 2, 2), devices=4):
    np.testing.assert_allclose(log_likelihoods(make(), WORLD[:9], labels[:9], batch=3), whole[:9], rtol=1e-5)


def test_the_generative_classifier_is_as_right_as_bayes_in_the_models_own_world():
  with small.use():
    log_p = of_every_class(make(), WORLD)
  # every image under every class as often as the model writes it there
  p = np.exp(log_p[:, :3])
  counts = np.round(p * 200_000).astype(int)
  at, labels = np.repeat(np.indices(counts.shape).reshape(2, -1), counts.reshape(-1), axis=1)
  found = measures(log_p[at], labels, 4)
  assert found["accuracy"] == pytest.approx(p.max(1).sum() / 3, abs=0.001)
  assert found["nll"] == pytest.approx(-(p * log_p[:, :3]).sum() / 3 / 4, rel=1e-3)
  assert found["nll"] < found["nll_null"]


def test_measures_by_hand():
  log_p = np.log([[0.5, 0.2, 0.3], [0.1, 0.4, 0.2], [0.3, 0.1, 0.2]])
  reference = np.log([[0.25, 0.2, 0.3], [0.2, 0.4, 0.1], [0.1, 0.1, 0.1]])
  found = measures(log_p, np.array([0, 0, 1]), 2, reference)
  ln = np.log
  assert found == pytest.approx({
    "nll": -(ln(0.5) + ln(0.1) + ln(0.1)) / 6,
    "nll_null": -(ln(0.3) + ln(0.2) + ln(0.2)) / 6,
    "accuracy": 1 / 3,
    "reward_pos": (ln(2) - ln(2) + 0) / 3,
    "reward_neg": (0 + 0 + ln(3)) / 3,
    "reward_null": (0 + ln(2) + ln(2)) / 3,
    "margin": (ln(2) - ln(2) - ln(3)) / 3,
    "reward_accuracy": 1 / 3,
  })  # fmt: skip
  assert set(measures(log_p, np.array([0, 0, 1]), 2)) == {"nll", "nll_null", "accuracy"}


def test_var_reads_what_its_tokenizer_makes_of_the_codes():
  wanted = images.expected("var_l2norm")
  with small.use():
    model, tokenizer = images.load("var_l2norm"), images.load("var_vqvae")
    found = log_likelihoods(model, wanted["gt_BL"], wanted["label_B"], tokenizer=tokenizer, batch=4)
  np.testing.assert_allclose(found, wanted["logp_cond_sum"], atol=5e-4)


@pytest.mark.parametrize(
  ("codes", "labels", "told"),
  [
    (WORLD[:2], [0, 4], "labels=4: must lie in 0 .. 3"),
    (WORLD[:2] - 1, [0, 1], "codes=-1: must lie in 0 .. 3"),
    (WORLD[:2, :3], [0, 1], "codes=.2, 3., labels .2.: must be .images, 4."),
    (WORLD[:2], [0], "codes=.2, 4., labels .1."),
  ],
)
def test_codes_and_classes_that_do_not_fit_are_told(codes, labels, told):
  with small.use():
    model = jax.eval_shape(lambda: LlamaGen(jax.random.key(0), MODEL))
  with pytest.raises(UserError, match=told):
    image_likelihood.log_likelihoods(model, codes, np.array(labels))
