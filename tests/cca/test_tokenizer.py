"""A tokenizer of one's own images is trained from a config: the sizes fit, and every term can be asked for."""

import dataclasses

import jax
from jax import numpy as jnp
import pytest

from experiments.cca.experiment import build
from research import config
from research.errors import UserError
from research.fit import abstract_batch, abstract_state
from tests import small

SPEC = "experiments/cca/configs/tokenizer.py"


def maps(images):
  return [images, jnp.abs(images)]


def experiment(spec, *overrides):
  ((_, cfg),) = config.expand(dataclasses.replace(config.load(f"{SPEC}:{spec}", overrides), seeds=(0,)))
  return build(cfg)


def terms(exp):
  """Names of what the loss says; nothing is compiled."""
  model, batch = abstract_state(exp).model, abstract_batch(exp)
  return set(jax.eval_shape(exp.loss, model, batch, jax.eval_shape(jax.random.key, 0)))


@pytest.mark.parametrize(
  "spec", ["pixels=8", "pixels=32,channels=3,classes=7", "pixels=64,tiny", "pixels=256,channels=3"]
)
def test_every_size_fits_together(spec):
  with small.use():
    assert terms(experiment(spec)) == {"loss", "pixels", "codes"}


def test_the_feature_network_of_the_perceptual_term_is_named_in_the_config():
  named = "features=tests.cca.test_tokenizer:maps"
  with small.use():
    exp = experiment("tiny", named, "reconstruction.perceptual=0.5", "reconstruction.adversarial=0.1")
    assert terms(exp) == {"loss", "pixels", "codes", "perceptual", "adversarial", "discriminator"}


def test_what_does_not_fit_is_told_in_one_line():
  with small.use():
    for name in ("", "nowhere:maps", "tests.cca.test_tokenizer:nothing", "tests.cca.test_tokenizer"):
      with pytest.raises(UserError, match="needs a function images -> maps as module:function"):
        experiment("tiny", f"features={name}", "reconstruction.perceptual=0.5")
    with pytest.raises(UserError, match="codes=8 x 8: must be 4 x 4"):
      experiment("tiny", "data.size=16")
    with pytest.raises(UserError, match="vqvae.image_channels=1: data has 3"):
      experiment("tiny", "data.channels=3")
  with pytest.raises(UserError, match="pixels=7: choose from 8, 32, 64, 256"):
    config.load(f"{SPEC}:pixels=7")
