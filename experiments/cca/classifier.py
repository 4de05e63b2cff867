"""A small convolutional classifier of images: whose features a distance is taken of, and whose opinion is asked."""

import dataclasses

from flax import nnx
import jax
from jax import P
from jax import numpy as jnp

from research.errors import check
from research.kernels.dispatch import place, reshape_rows
from research.mesh import BATCH
from research.metrics import Mean
from research.models.decoder import log_likelihood
from research.nn.conv import IMAGES, Conv
from research.nn.init import fan_in
from research.nn.precision import POLICIES


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
  """channels: of each level, which halves the image. features: before the last layer. Raises UserError."""

  channels: tuple[int, ...] = (32, 64)
  features: int = 24

  def __post_init__(self):
    check(
      len(self.channels) >= 1 and min(self.channels) >= 1, "channels", self.channels, "needs a positive number or more"
    )
    check(self.features >= 1, "features", self.features, "must be at least 1")

  def check_image(self, size: int) -> None:
    """Raises UserError for images that do not halve as often."""
    least = 2 ** len(self.channels)
    check(size % least == 0, "size", size, f"must be a multiple of {least}: the classifier halves it so often")


class Classifier(nnx.Module):
  """Two convolutions a level, then features, then classes. Any mesh will do: only batches are cut."""

  def __init__(self, key: jax.Array, cfg: ClassifierConfig, size: int, channels: int, classes: int):
    policy, sizes = POLICIES["float32"], (channels, *cfg.channels)
    keys = jax.random.split(key, 2 * len(cfg.channels) + 2)
    self.convs = nnx.List(
      [
        Conv(keys[2 * i + j], sizes[i + j], sizes[i + 1], policy, stride=1 + j)
        for i in range(len(cfg.channels))
        for j in range(2)
      ]
    )
    flat = (size // 2 ** len(cfg.channels)) ** 2 * sizes[-1]
    dense = lambda key, a, b: nnx.Param(fan_in(key, (a, b), a, policy.params, P(None, None)), matrix=((-2,), (-1,)))
    self.dense, self.head = dense(keys[-2], flat, cfg.features), dense(keys[-1], cfg.features, classes)

  def features(self, images: jax.Array) -> jax.Array:
    """Images [batch, size, size, channels] in [-1, 1] -> float32 [batch, features], before their non-linearity."""
    x = place(images, IMAGES)
    for conv in self.convs:
      x = jax.nn.silu(conv(x))
    return reshape_rows(x, self.dense[...].shape[0]) @ self.dense[...]

  def log_probs(self, features: jax.Array) -> jax.Array:
    """Features -> float32 [batch, classes]."""
    return jax.nn.log_softmax(jax.nn.silu(features) @ self.head[...], axis=-1)


def loss(model: Classifier, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, Mean]:
  """Cross-entropy in nats an image, and accuracy: batch has images, labels int32 and weights float32 [batch]."""
  del key  # deterministic
  log_p = model.log_probs(model.features(batch["images"]))
  labels, weights = (place(batch[name], P(BATCH)) for name in ("labels", "weights"))
  right = (jnp.argmax(log_p, axis=-1) == labels).astype(jnp.float32)
  mean = lambda x: Mean(jnp.sum(weights * x), jnp.sum(weights))
  return {"loss": mean(-log_likelihood(log_p, labels)), "accuracy": mean(right)}
