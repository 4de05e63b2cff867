"""Training the tokenizers of images: losses, and codes that nobody uses brought back to life.

Reconstruction and codebook losses; on demand a perceptual one (Johnson et al., 2016, arXiv 1603.08155) on the maps of a
network that is given, and an adversarial one (VQGAN, Esser et al., 2021, arXiv 2012.09841). Nothing is downloaded.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
from jax import P
from jax import numpy as jnp

from research.errors import check
from research.fit import Experiment, TrainState, default_train_step
from research.kernels.dispatch import place
from research.metrics import Mean
from research.models.vq import VQ
from research.models.vqvae import VQVAE
from research.nn.conv import IMAGES, Conv, GroupNorm
from research.nn.norms import unit
from research.nn.precision import Policy


class State(nnx.Variable):
  """Numbers that training keeps and no gradient moves."""


@dataclasses.dataclass(frozen=True)
class TokenizerLoss:
  """Weights of the terms, and when the adversarial one begins. Raises UserError."""

  pixels: float = 1.0
  perceptual: float = 1.0
  adversarial: float = 0.5
  adversarial_from: int = 20000  # updates

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      check(value >= 0, field.name, value, "must not be negative")


@dataclasses.dataclass(frozen=True)
class Revival:
  """When a code is dead: its share of all look-ups, averaged over about 1 / (1 - decay) updates, is below
  `threshold` of an even share; 0: never. Raises UserError."""

  threshold: float = 0.03
  decay: float = 0.99

  def __post_init__(self):
    check(0 <= self.threshold < 1, "threshold", self.threshold, "must lie in [0, 1)")
    check(0 <= self.decay < 1, "decay", self.decay, "must lie in [0, 1)")


_REVIVAL = Revival()


class Trained(nnx.Module):
  """A tokenizer, a discriminator of images [batch, ...] -> scores or None, and what training keeps of the codes.

  usage: float32 [scales, vocab], the running share of each code among the look-ups of a scale.
  updates: float32 scalar, made so far: a float because all of a model is differentiated.
  """

  def __init__(self, tokenizer: VQ | VQVAE, discriminator: nnx.Module | None = None):
    self.tokenizer, self.discriminator = tokenizer, discriminator
    cfg = tokenizer.cfg
    even = jnp.full((len(_counts(cfg)), cfg.vocab), 1 / cfg.vocab, jnp.float32)
    self.usage, self.updates = State(place(even, P(None, None))), State(place(jnp.zeros((), jnp.float32), P()))


class PatchDiscriminator(nnx.Module):
  """Scores of overlapping patches (Isola et al., 2017, arXiv 1611.07004), with group norms for batch norms."""

  def __init__(self, key: jax.Array, policy: Policy, image_channels: int = 3, base: int = 64, layers: int = 3):
    widths = [base * min(2**i, 8) for i in range(layers + 1)]
    keys = jax.random.split(key, layers + 2)
    self.first = Conv(keys[0], image_channels, base, policy, stride=2)
    pairs = list(zip(widths, widths[1:], strict=False))
    strides = [2] * (layers - 1) + [1]
    self.convs = nnx.List(
      [Conv(k, a, b, policy, stride=s) for k, (a, b), s in zip(keys[1:], pairs, strides, strict=False)]
    )
    self.norms = nnx.List([GroupNorm(b, policy) for _, b in pairs])
    self.last = Conv(keys[-1], widths[-1], 1, policy)

  def __call__(self, images: jax.Array) -> jax.Array:
    """images [batch, height, width, channels] -> float32 [batch, height', width', 1]; larger: more like a real one."""
    x = jax.nn.leaky_relu(self.first(place(images, IMAGES)), 0.2)
    for conv, norm in zip(self.convs, self.norms, strict=True):
      x = jax.nn.leaky_relu(norm(conv(x)), 0.2)
    return self.last(x).astype(jnp.float32)


def loss(
  model: Trained,
  batch: Mapping[str, jax.Array],
  key: jax.Array,
  *,
  weights: TokenizerLoss = TokenizerLoss(),
  features: Callable[[jax.Array], Sequence[jax.Array]] | None = None,
) -> dict[str, Mean]:
  """What a tokenizer is trained by: batch has images float32 [batch, height, width, channels] in [-1, 1].

  features: images -> maps [batch, ..., channels] of a network that is not trained. One sum serves
  tokenizer and discriminator: each is a constant in the other's terms (a hinge for the discriminator).
  Every term is a mean over the rows, with its weight but for "pixels".
  """
  del key  # deterministic
  images, sg = place(batch["images"], IMAGES), jax.lax.stop_gradient
  quantized = model.tokenizer.quantize(model.tokenizer.features(images))
  made = model.tokenizer.decode(quantized.features)
  pixels = jnp.mean(jnp.square(made - images))
  terms = {"codes": sum(quantized.losses.values())}
  if features is not None:
    terms["perceptual"] = weights.perceptual * perceptual(features(made), features(images))
  if model.discriminator is not None:
    began = jnp.where(model.updates[...] >= weights.adversarial_from, 1.0, 0.0)
    fixed, trained = jax.tree.map(sg, model.discriminator), model.discriminator
    terms["adversarial"] = -began * weights.adversarial * jnp.mean(fixed(made))
    hinge = jnp.mean(jax.nn.relu(1 - trained(images))) + jnp.mean(jax.nn.relu(1 + trained(sg(made))))
    terms["discriminator"] = began * hinge / 2
  total = weights.pixels * pixels + sum(terms.values())
  rows = jnp.asarray(len(images), jnp.float32)
  return {name: Mean(x * rows, rows) for name, x in ({"loss": total, "pixels": pixels} | terms).items()}


def perceptual(made: Sequence[jax.Array], images: Sequence[jax.Array]) -> jax.Array:
  """The mean squared distance of maps of unit vectors, summed over the maps (Zhang et al., 2018, arXiv 1801.03924,
  with all channels alike)."""
  return sum(jnp.mean(jnp.sum(jnp.square(unit(a) - unit(b)), axis=-1)) for a, b in zip(made, images, strict=True))


def train_step(
  exp: Experiment,
  cfg: Any,
  state: TrainState,
  batch: Mapping[str, jax.Array],
  reference: Any = None,
  *,
  revival: Revival = _REVIVAL,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """An `Experiment.train_step` for a `Trained`: the default, then the codes' usage and the revival of dead codes.

  These become vectors that were looked up. Costs one pass of the encoder more. Metrics: the share of the codes that
  are alive, how many are revived, and for each scale the perplexity of its codes (the codebook's size where all are
  used alike).
  """
  new, metrics = default_train_step(exp, cfg, state, batch, reference)
  quantized = state.model.tokenizer.quantize(state.model.tokenizer.features(place(batch["images"], IMAGES)))
  key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
  model, told = revive(new.model, quantized, key, revival)
  return dataclasses.replace(new, model=model), metrics | told


def revive(model: Trained, quantized: Any, key: jax.Array, revival: Revival) -> tuple[Trained, dict[str, jax.Array]]:
  """(the model with the usage after `quantized`, and its dead codes replaced; metrics)."""
  cfg = model.tokenizer.cfg
  usage = _share(cfg, quantized.codes) * (1 - revival.decay) + model.usage[...] * revival.decay
  counts = jnp.asarray(_counts(cfg), jnp.float32)
  dead = counts @ usage / jnp.sum(counts) < revival.threshold / cfg.vocab
  sought = place(quantized.sought, P(None, None, None)).reshape(-1, cfg.code_width)
  found = sought[jax.random.randint(key, (cfg.vocab,), 0, len(sought))]
  dead = dead & jnp.all(jnp.isfinite(found), axis=-1)
  model = jax.tree.map(lambda x: x, model)
  book = model.tokenizer.codebook[...]
  model.tokenizer.codebook[...] = jnp.where(dead[:, None], found.astype(book.dtype), book)
  model.usage[...] = jnp.where(dead, 1 / cfg.vocab, usage)  # time to be found
  model.updates[...] = model.updates[...] + 1
  told = {"codebook_alive": jnp.mean(~dead), "codebook_revived": jnp.sum(dead)}
  perplexity = jnp.exp(-jnp.sum(jax.scipy.special.xlogy(usage, usage), axis=-1))
  return model, told | {f"codebook_perplexity_{i}": x for i, x in enumerate(perplexity)}


def _counts(cfg: Any) -> list[int]:
  """Look-ups of each scale an image, relative to each other."""
  return [n * n for n in getattr(cfg, "scales", (1,))]


def _share(cfg: Any, codes: jax.Array) -> jax.Array:
  """codes int32 [batch, ...] -> the share of each code among those of its scale, float32 [scales, vocab]."""
  codes = place(codes, P(*[None] * codes.ndim))
  parts = [codes]
  if hasattr(cfg, "scales"):
    counts = _counts(cfg)
    parts = jnp.split(codes, [sum(counts[:i]) for i in range(1, len(counts))], axis=1)
  return jnp.stack([jnp.bincount(x.ravel(), length=cfg.vocab) / x.size for x in parts])
