"""Tokenizers of images are trained by the loop: each term moves what it should, and dead codes come back."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from research import data, optim, tokenizer_training, writers
from research.checkpoint import Checkpoints
from research.config import CheckpointConfig, RunConfig
from research.errors import UserError
from research.fit import Experiment, abstract_batch, abstract_state, fit
from research.mesh import MeshConfig, abstract_mesh, to_devices
from research.models import vq, vqvae
from research.models.vq import VQ, VQConfig
from research.models.vqvae import VQVAE, VQVAEConfig
from research.nn.precision import POLICIES
from research.nn.resize import area_matrix, resize
from research.optim import OptimizerConfig
from research.tokenizer_training import PatchDiscriminator, Revival, TokenizerLoss, Trained, revive, train_step
from tests import small

SIZES = {"vocab": 16, "code_width": 4, "latent": 4, "channels": 32, "mult": (1, 1), "blocks": 1, "image_channels": 1}
CFG = VQVAEConfig(scales=(1, 2, 4), phis=2, **SIZES)
POLICY = POLICIES["float32"]


class Images:
  """Sixteen grey images of 8 x 8: bars at some place."""

  def __len__(self):
    return 16

  def __getitem__(self, i):
    image = np.full((8, 8, 1), -1, np.float32)
    image[(slice(None), i // 2) if i % 2 else i // 2] = 1
    return {"images": image}

  def __repr__(self):
    return "Images"


def pools(images):
  """A feature network that needs no weights: the image at two resolutions, beside a constant."""
  return [jnp.concatenate([x, jnp.ones_like(x)], axis=-1) for x in (images, resize(images, area_matrix(8, 4)))]


def trained(key, adversary=True):
  keys = jax.random.split(key)
  adversary = PatchDiscriminator(keys[1], POLICY, image_channels=1, base=32, layers=1) if adversary else None
  return Trained(VQVAE(keys[0], CFG), adversary)


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_loop_trains_the_multi_scale_tokenizer_with_every_term(devices, tmp_path):
  weights = TokenizerLoss(perceptual=0.1, adversarial=0.01, adversarial_from=2)
  exp = Experiment(
    init=trained,
    loss=functools.partial(tokenizer_training.loss, weights=weights, features=pools),
    data=lambda split: data.batches(Images(), 8, seed=0, train=split == "train"),
    tx=optax.adam(2e-3),
    train_step=functools.partial(train_step, revival=Revival(threshold=0.5, decay=0.8)),
  )
  cfg = RunConfig(
    "none", steps=30, batch=8, length=2, log_every=1, eval_every=30, tx=OptimizerConfig(warmup=0),
    checkpoint=CheckpointConfig(every=30),
  )  # fmt: skip
  writer = writers.Writer(tmp_path, "main", 0, cfg.steps)
  with small.use(MeshConfig(1, devices, 1), devices), Checkpoints(tmp_path / "checkpoints", 1) as checkpoints:
    state = fit(exp, cfg, checkpoints, writer)
    writer.close()
    assert list(checkpoints.steps()) == [30]
  records = writers.read(tmp_path / "metrics.jsonl")
  logged = [r for r in records if r["kind"] == "train"]
  evals = [r["pixels"] for r in records if r["kind"] == "eval"]
  assert evals[-1] < 0.6 * evals[0]
  assert [r["discriminator"] > 0 for r in logged] == [False] * 2 + [True] * 28
  assert all(r["perceptual"] > 0 for r in logged)
  assert sum(r["codebook_revived"] for r in logged) > 0
  assert all(0 < r["codebook_alive"] <= 1 for r in logged)
  assert 1 <= logged[-1]["codebook_perplexity_2"] <= CFG.vocab
  assert float(state.model.updates[...]) == 30


@pytest.mark.parametrize("kind", ["VQ-16", pytest.param("vae_ch160v4096z32", marks=pytest.mark.slow)])
def test_an_update_of_an_official_tokenizer_traces_on_an_abstract_pod(kind):
  make, cfg = (VQ, vq.OFFICIAL[kind]) if kind in vq.OFFICIAL else (VQVAE, vqvae.OFFICIAL[kind])
  exp = Experiment(
    init=lambda key: Trained(make(key, cfg), PatchDiscriminator(key, POLICY)),
    loss=tokenizer_training.loss,
    data=lambda split: None,
    tx=optim.make(OptimizerConfig(), 1000),
    batch=lambda: {"images": jax.ShapeDtypeStruct((64, 256, 256, 3), np.float32)},
  )
  with jax.sharding.use_abstract_mesh(abstract_mesh(MeshConfig(2, 8, 1, "fsdp"), 16)):
    state, batch = abstract_state(exp), abstract_batch(exp)
    new, metrics = jax.eval_shape(functools.partial(train_step, exp, RunConfig("none")), state, batch)
  specs = lambda state: [x.sharding.spec for x in jax.tree.leaves(state.model)]
  assert specs(new) == specs(state)
  scales = len(getattr(cfg, "scales", (1,)))
  assert sum(name.startswith("codebook_perplexity_") for name in metrics) == scales
  assert all(x.shape == () for x in jax.tree.leaves(metrics))


@pytest.mark.slow
def test_each_term_moves_its_own_part_only():
  images = {"images": np.stack([Images()[i]["images"] for i in range(4)])}
  weights = TokenizerLoss(adversarial=0.5, adversarial_from=1)
  with small.use():
    model, images = jax.jit(trained)(jax.random.key(0)), to_devices(images)

    @jax.jit
    @jax.grad
    def grads(model):
      return tokenizer_training.loss(model, images, None, weights=weights)["loss"].total / 4

    off = grads(model)
    model.updates[...] = model.updates[...] + 1
    on = grads(model)
    tokenizer, adversary = model.tokenizer, model.discriminator
    features = jax.jit(lambda t: t.quantize(t.features(images["images"])).features)(tokenizer)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def alone(decoder, adversary):
      made = decoder(tokenizer.from_code(features))
      fixed, sg = jax.tree.map(jax.lax.stop_gradient, adversary), jax.lax.stop_gradient
      hinge = jnp.mean(jax.nn.relu(1 - adversary(images["images"]))) + jnp.mean(jax.nn.relu(1 + adversary(sg(made))))
      return hinge / 2 - 0.5 * jnp.mean(fixed(made))

    of_decoder, of_adversary = alone(tokenizer.decoder, adversary)
  assert all((x == 0).all() for x in small.leaves((off.discriminator, on.usage, on.updates)))
  for a, b in zip(small.leaves(on.discriminator), small.leaves(of_adversary), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  leaves = (small.leaves(x) for x in (on.tokenizer.decoder, off.tokenizer.decoder, of_decoder))
  for a, b, c in zip(*leaves, strict=True):
    np.testing.assert_allclose(a - b, c, rtol=1e-3, atol=1e-4)
  assert max(np.abs(x).max() for x in small.leaves((of_decoder, of_adversary))) > 1e-2


@pytest.mark.parametrize("kind", ["one scale", "many"])
def test_codes_below_their_share_become_vectors_that_were_looked_up(kind):
  many = kind == "many"
  with small.use():
    key = jax.random.key(0)
    tokenizer = VQVAE(key, CFG) if many else VQ(key, VQConfig(**SIZES, l2_norm=False))
    model = Trained(tokenizer)
    before = np.asarray(model.tokenizer.codebook[...])
    found = tokenizer.quantize(jax.random.normal(jax.random.key(1), (3, 4, 4, 4)))
    after, told = jax.jit(lambda *x: revive(*x, Revival(threshold=0.5, decay=0.25)))(model, found, jax.random.key(2))
  codes, scales = np.asarray(found.codes).reshape(3, -1), (1, 4, 16) if many else (16,)
  parts = np.split(codes, np.cumsum(scales)[:-1], axis=1)
  share = np.stack([np.bincount(x.ravel(), minlength=16) / x.size for x in parts]) * 0.75 + 0.25 / 16
  dead = np.average(share, axis=0, weights=scales) < 0.5 / 16
  assert 0 < dead.sum() < 16
  now, sought = np.asarray(after.tokenizer.codebook[...]), np.asarray(found.sought).reshape(-1, 4)
  np.testing.assert_array_equal(now[~dead], before[~dead])
  assert all((np.abs(sought - row).max(1) == 0).any() for row in now[dead])
  np.testing.assert_allclose(after.usage[...], np.where(dead, 1 / 16, share), rtol=1e-5)
  assert int(told["codebook_revived"]) == dead.sum()
  np.testing.assert_allclose(told["codebook_alive"], (~dead).mean())


def test_maps_that_are_the_same_are_at_no_distance():
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)), jnp.float32)
  maps = pools(images)
  assert float(tokenizer_training.perceptual(maps, maps)) == 0
  far = tokenizer_training.perceptual(pools(-images), maps)
  by_hand = 0
  for x in maps:
    a = np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)
    b = a * np.array([-1, 1])
    by_hand += np.square(a - b).sum(-1).mean()
  np.testing.assert_allclose(far, by_hand, rtol=1e-5)


def test_settings_out_of_range_are_told_in_one_line():
  with pytest.raises(UserError, match="adversarial=-1"):
    TokenizerLoss(adversarial=-1)
  with pytest.raises(UserError, match="threshold=1"):
    Revival(threshold=1)
