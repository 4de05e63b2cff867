"""The image tokenizer of LlamaGen: a VQGAN with a small, l2-normalised codebook.

Sun et al., 2024 (arXiv 2406.06525), after Yu et al., 2022 (ViT-VQGAN, arXiv 2110.04627): codes and
features are compared, and returned, on the unit sphere. Images are NHWC in [-1, 1].
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

from flax import nnx
import jax
from jax import P
from jax import numpy as jnp

from research.errors import check
from research.kernels.dispatch import place, reshape_rows
from research.mesh import MeshConfig
from research.nn.conv import GROUPS, IMAGES, Conv, Stack
from research.nn.norms import unit
from research.nn.precision import POLICIES


@dataclasses.dataclass(frozen=True)
class ConvConfig:
  """Sizes of a convolutional tokenizer. Raises UserError.

  vocab codes of code_width numbers, which 1 x 1 (or code_kernel) convolutions make of `latent` channels.
  channels times mult are the channels of each level; every level but the last halves the image.
  """

  vocab: int = 16384
  code_width: int = 8
  latent: int = 256
  channels: int = 128
  mult: tuple[int, ...] = (1, 1, 2, 2, 4)
  blocks: int = 2
  code_kernel: int = 1
  image_channels: int = 3
  commitment: float = 0.25
  precision: Literal["float32", "bfloat16"] = "float32"

  def __post_init__(self):
    for name in ("vocab", "code_width", "latent", "blocks", "image_channels"):
      check(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
    whole = all(self.channels * m >= 1 and self.channels * m % GROUPS == 0 for m in (1, *self.mult))
    check(whole, "channels", self.channels, f"must be a multiple of {GROUPS}: the norms have as many groups")
    check(len(self.mult) >= 1, "mult", self.mult, "needs at least one level")
    check(self.code_kernel in (1, 3), "code_kernel", self.code_kernel, "use 1 or 3")
    check(self.commitment >= 0, "commitment", self.commitment, "must not be negative")

  @property
  def downsample(self) -> int:
    """Pixels of the image a cell of the grid of codes, along a side."""
    return 2 ** (len(self.mult) - 1)

  def check_mesh(self, mesh: dict[str, int], partition: str) -> None:
    """Any mesh will do: only batches are cut."""

  def check_image(self, shape: tuple[int, ...]) -> None:
    """Raises UserError for images that do not halve as often as the encoder does."""
    sizes = f"{shape[1]}x{shape[2]}"
    fits = all(n % self.downsample == 0 and n > 0 for n in shape[1:3])
    check(fits, "image", sizes, f"height and width must be multiples of {self.downsample}")
    check(shape[3] == self.image_channels, "image", shape, f"must have {self.image_channels} channels")


@dataclasses.dataclass(frozen=True)
class VQConfig(ConvConfig):
  """Those of the convolutions; l2_norm: see above; entropy: weight of that loss, 0 in the released training."""

  l2_norm: bool = True
  entropy: float = 0.0


OFFICIAL = {"VQ-16": VQConfig(), "VQ-8": VQConfig(mult=(1, 2, 2, 4))}


class Quantized(NamedTuple):
  """features: [batch, ..., code_width], the codes, with the gradient of what they stand for; codes: int32 [batch, ...].

  losses: "codebook", "commitment" and "entropy", each with its weight. sought: the vectors that were looked
  up, [batch, tokens, code_width].
  """

  features: jax.Array
  codes: jax.Array
  losses: dict[str, jax.Array]
  sought: jax.Array


class ConvTokenizer(nnx.Module):
  """What the tokenizers share: the way from images to features of the codes' width and back, and the codebook."""

  def __init__(self, key: jax.Array, cfg: Any, partition: str = MeshConfig.partition):
    del partition  # see research.nn.conv
    policy = POLICIES[cfg.precision]
    keys = jax.random.split(key, 5)
    sizes = (cfg.channels, cfg.mult)
    self.encoder = Stack(keys[0], cfg.image_channels, cfg.latent, *sizes, cfg.blocks, False, policy)
    self.decoder = Stack(keys[1], cfg.latent, cfg.image_channels, *sizes, cfg.blocks + 1, True, policy)
    self.to_code = Conv(keys[2], cfg.latent, cfg.code_width, policy, cfg.code_kernel)
    self.from_code = Conv(keys[3], cfg.code_width, cfg.latent, policy, cfg.code_kernel)
    book = jax.random.uniform(keys[4], (cfg.vocab, cfg.code_width), policy.params, -1 / cfg.vocab, 1 / cfg.vocab)
    self.codebook = nnx.Param(place(book, P(None, None)))
    self.cfg = cfg

  def features(self, images: jax.Array) -> jax.Array:
    """Images [batch, height, width, channels] in [-1, 1] -> float32 [batch, height', width', code_width]."""
    self.cfg.check_image(images.shape)
    return self.to_code(self.encoder(place(images, IMAGES))).astype(jnp.float32)

  def decode(self, features: jax.Array) -> jax.Array:
    """Features [batch, height', width', code_width] -> float32 images, not clipped."""
    return self.decoder(self.from_code(place(features, IMAGES))).astype(jnp.float32)


class VQ(ConvTokenizer):
  """LlamaGen's tokenizer."""

  def __init__(self, key: jax.Array, cfg: VQConfig, partition: str = MeshConfig.partition):
    super().__init__(key, cfg, partition)
    if cfg.l2_norm:
      self.codebook[...] = unit(self.codebook[...])

  def encode(self, images: jax.Array) -> jax.Array:
    """Images [batch, height, width, channels] in [-1, 1] -> codes int32 [batch, height', width']."""
    return self.quantize(self.features(images)).codes

  def decode_codes(self, codes: jax.Array) -> jax.Array:
    """Codes int32 [batch, height', width'] -> images, clipped to [-1, 1]."""
    return jnp.clip(self.decode(self.lookup(codes)), -1, 1)

  def lookup(self, codes: jax.Array) -> jax.Array:
    """Codes int32 [batch, ...] -> what the decoder gets for them, float32 [batch, ..., code_width]."""
    return look_up(self._book(), codes)

  def quantize(self, z: jax.Array) -> Quantized:
    """Features float32 [batch, ..., code_width] -> the nearest codes, and the losses that bring both together.

    codebook mean((e - sg z)^2), commitment * mean((sg e - z)^2) (van den Oord et al., 2017, arXiv
    1711.00937), and entropy * (mean entropy of softmax(-d / 0.01) - entropy of its mean) over squared
    distances d, which wants sure choices and a codebook in even use.
    """
    cfg, book = self.cfg, self._book()
    z = unit(z) if cfg.l2_norm else z
    codes, distances = nearest(book, z)
    e = look_up(book, codes)
    sg = jax.lax.stop_gradient
    losses = {
      "codebook": jnp.mean(jnp.square(e - sg(z))),
      "commitment": cfg.commitment * jnp.mean(jnp.square(sg(e) - z)),
      "entropy": cfg.entropy * _entropy(distances) if cfg.entropy else jnp.zeros(()),
    }
    return Quantized(z + sg(e - z), codes, losses, reshape_rows(z, math.prod(codes.shape[1:]), cfg.code_width))

  def _book(self) -> jax.Array:
    book = self.codebook[...].astype(jnp.float32)
    return unit(book) if self.cfg.l2_norm else book


def nearest(book: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(int32 [batch, ...] of the nearest rows of `book` [vocab, width], squared distances [batch, ..., vocab]) of `z`."""
  products = jnp.einsum("...c,vc->...v", z, book)
  distances = jnp.sum(jnp.square(z), axis=-1, keepdims=True) + jnp.sum(jnp.square(book), axis=-1) - 2 * products
  return jnp.argmin(distances, axis=-1).astype(jnp.int32), distances


def look_up(book: jax.Array, codes: jax.Array) -> jax.Array:
  """The rows of `book` [vocab, width] at int32 codes [batch, ...]."""
  spec = P(IMAGES[0], *[None] * codes.ndim)
  return book.at[place(codes, P(*spec[:-1]))].get(out_sharding=spec)


def _entropy(distances: jax.Array) -> jax.Array:
  """Mean entropy of softmax(-distances / 0.01) less the entropy of the mean, in nats."""
  logits = -distances / 0.01
  log_p = jax.nn.log_softmax(logits, axis=-1)
  p = jax.nn.softmax(logits, axis=-1)
  mean = jnp.mean(p, axis=tuple(range(p.ndim - 1)))
  return jnp.sum(mean * jnp.log(mean + 1e-5)) - jnp.mean(jnp.sum(p * log_p, axis=-1))
