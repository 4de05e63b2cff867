"""The image tokenizer of VAR: codes at several scales, each for what the coarser ones left over.

Tian et al., 2024 (arXiv 2404.02905): one codebook for all scales, not normalised. The features of an
image are approached scale by scale: the residual, averaged down to n x n, is looked up; the codes found,
scaled up and passed through a convolution phi, are taken from it. Images are NHWC in [-1, 1].
"""

import dataclasses
from typing import NamedTuple

from flax import nnx
import jax
from jax import numpy as jnp
import numpy as np

from research.errors import check
from research.kernels.dispatch import place, reshape_rows
from research.mesh import TOKENS, MeshConfig
from research.models.vq import ConvConfig, ConvTokenizer, look_up, nearest
from research.nn.conv import Conv
from research.nn.precision import POLICIES
from research.nn.resize import area_matrix, bicubic_matrix, resize


def check_scales(scales: tuple[int, ...]) -> None:
  """Raises UserError unless the sides grow from at least 1."""
  grow = len(scales) >= 2 and scales[0] >= 1 and all(a < b for a, b in zip(scales, scales[1:], strict=False))
  check(grow, "scales", scales, "must be at least two sides that grow, e.g. (1, 2, 3, 4)")


@dataclasses.dataclass(frozen=True)
class VQVAEConfig(ConvConfig):
  """Those of the convolutions, and: Raises UserError.

  scales: sides of the grids of codes, the last that of the features.
  phis: how many convolutions the scales share; phi_ratio: their part, the rest is identity.
  """

  vocab: int = 4096
  code_width: int = 32
  latent: int = 32
  channels: int = 160
  code_kernel: int = 3
  scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
  phis: int = 4
  phi_ratio: float = 0.5

  def __post_init__(self):
    super().__post_init__()
    check_scales(self.scales)
    check(self.phis >= 1, "phis", self.phis, "must be at least 1")
    check(0 <= self.phi_ratio <= 1, "phi_ratio", self.phi_ratio, "must lie in [0, 1]")

  @property
  def tokens(self) -> int:
    """Codes an image."""
    return sum(n * n for n in self.scales)

  def check_image(self, shape: tuple[int, ...]) -> None:
    super().check_image(shape)
    side = self.scales[-1] * self.downsample
    check(
      tuple(shape[1:3]) == (side, side), "image", f"{shape[1]}x{shape[2]}", f"must be {side}x{side}: the last scale"
    )


OFFICIAL = {"vae_ch160v4096z32": VQVAEConfig()}


class Quantized(NamedTuple):
  """features: [batch, n, n, code_width], with the gradient of what they stand for; codes: int32 [batch, tokens].

  losses: "codebook" and "commitment", each with its weight. partial: the features after each scale.
  sought: the vectors that were looked up, [batch, tokens, code_width].
  """

  features: jax.Array
  codes: jax.Array
  losses: dict[str, jax.Array]
  partial: list[jax.Array]
  sought: jax.Array


class VQVAE(ConvTokenizer):
  """VAR's tokenizer. Codes int32 [batch, tokens] are those of all scales, from the coarsest on, each row by row."""

  def __init__(self, key: jax.Array, cfg: VQVAEConfig, partition: str = MeshConfig.partition):
    super().__init__(key, cfg, partition)
    keys = jax.random.split(jax.random.fold_in(key, 1), cfg.phis)
    self.phis = nnx.List([Conv(k, cfg.code_width, cfg.code_width, POLICIES[cfg.precision]) for k in keys])

  def encode(self, images: jax.Array) -> jax.Array:
    """Images [batch, side, side, channels] in [-1, 1] -> codes int32 [batch, tokens]."""
    return self.quantize(self.features(images)).codes

  def decode_codes(self, codes: jax.Array, scales: int | None = None) -> jax.Array:
    """Codes -> images, clipped to [-1, 1]; of the first so many `scales` only, if given."""
    return jnp.clip(self.decode(self.partial(codes)[-1 if scales is None else scales - 1]), -1, 1)

  def quantize(self, f: jax.Array) -> Quantized:
    """Features float32 [batch, n, n, code_width] -> codes at every scale, and losses, means over the scales.

    With f' the features after a scale: codebook mean((f' - sg f)^2), commitment * mean((sg f' - f)^2).
    """
    sg, book, n = jax.lax.stop_gradient, self._book(), self.cfg.scales[-1]
    rest, now, codes, partial, sought = sg(f), jnp.zeros_like(f), [], [], []
    for i, side in enumerate(self.cfg.scales):
      z = rest if side == n else resize(rest, area_matrix(n, side))
      found, _ = nearest(sg(book), z)
      h = self._spread(book, found, i)
      now, rest = now + h, rest - sg(h)
      codes.append(reshape_rows(found, side * side))
      partial.append(now)
      sought.append(reshape_rows(z, side * side, z.shape[-1]))
    mean = lambda g: sum(map(g, partial)) / len(partial)
    losses = {
      "codebook": mean(lambda now: jnp.mean(jnp.square(now - sg(f)))),
      "commitment": self.cfg.commitment * mean(lambda now: jnp.mean(jnp.square(sg(now) - f))),
    }
    codes, sought = jnp.concatenate(codes, axis=1), jnp.concatenate(sought, axis=1)
    return Quantized(f + sg(now - f), codes, losses, partial, sought)

  def partial(self, codes: jax.Array) -> list[jax.Array]:
    """Codes [batch, tokens] of the first scales, or all -> the features after each, [batch, n, n, code_width]."""
    out, at, now = [], 0, 0.0
    for i, side in enumerate(self.cfg.scales):
      if at < codes.shape[1]:
        now = now + self.spread(codes[:, at : at + side * side], i)
        out.append(now)
      at += side * side
    return out

  def inputs(self, codes: jax.Array) -> jax.Array:
    """What VAR reads to predict `codes` [batch, tokens] of all scales but the first, [batch, ..., code_width].

    To the cells of a scale: the features after all coarser scales, averaged down to it.
    """
    parts = [self.next_input(now, i) for i, now in enumerate(self.partial(codes)[:-1])]
    return jnp.concatenate(parts, axis=1)

  def spread(self, codes: jax.Array, scale: int) -> jax.Array:
    """What codes int32 [batch, side^2] of a scale add to the features, [batch, n, n, code_width]."""
    side = self.cfg.scales[scale]
    return self._spread(self._book(), reshape_rows(place(codes, TOKENS), side, side), scale)

  def next_input(self, features: jax.Array, scale: int) -> jax.Array:
    """The features after a scale -> what VAR reads at the next, [batch, side^2, code_width]."""
    side, n = self.cfg.scales[scale + 1], self.cfg.scales[-1]
    return reshape_rows(resize(features, area_matrix(n, side)), side * side, features.shape[-1])

  def _spread(self, book, codes, scale):
    h, n = look_up(book, codes), self.cfg.scales[-1]
    h = h if codes.shape[1] == n else resize(h, bicubic_matrix(codes.shape[1], n))
    phi, ratio = self.phis[phi_of_scale(len(self.cfg.scales), self.cfg.phis)[scale]], self.cfg.phi_ratio
    return h * (1 - ratio) + phi(h).astype(h.dtype) * ratio

  def _book(self) -> jax.Array:
    return self.codebook[...].astype(jnp.float32)


def phi_of_scale(scales: int, phis: int) -> list[int]:
  """Which phi each scale passes through: that whose tick is nearest to scale / (scales - 1).

  For 10 scales and 4 phis two are ties, which the released code's rounding in float64 decides; float32 has
  another list.
  """
  edge = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
  ticks = np.linspace(edge, 1 - edge, phis)
  return [int(np.argmin(np.abs(ticks - i / max(scales - 1, 1)))) for i in range(scales)]
