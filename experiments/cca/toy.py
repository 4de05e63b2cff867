"""A world of a few images and classes, in which every expectation is a sum and every target is known.

p(x|c) is a table and p(c) uniform. The model starts from it, a softmax of free logits for each
class, and descends the expectation of a loss; guidance of scale s means
p(x|c) (p(x|c)/p(x))^s / Z(c).
"""

import dataclasses
import functools
from typing import Literal

from flax import nnx
import jax
from jax import P
from jax import numpy as jnp
import numpy as np

from experiments.cca.losses import LOSSES
from research import optim
from research.config import RunConfig
from research.data import same_batch
from research.errors import check
from research.fit import Experiment
from research.mesh import batch_shard
from research.metrics import Mean

METHODS = (*LOSSES, "gft", "ddo")
CONTRAST = 1.5  # deviation of log p(x|c)
SCALES = np.linspace(0, 6, 601)  # of guidance, that a model is compared with


@dataclasses.dataclass(frozen=True)
class ToyConfig:
  """A world, and what its model descends.

  gft: guidance-free training (arXiv 2501.15420), cross-entropy of beta log p_theta(x|c) + (1 - beta) log p(x).
  ddo: the pretrained model is a flatter p, and negatives are its own samples (arXiv 2503.01103).
  """

  classes: int = 6
  images: int = 6
  method: Literal[*METHODS] = "cca"
  beta: float = 0.5
  lam: float = 0.0  # 0: for each class the one at which the target is reached, Z(c)^beta
  collisions: bool = False  # pairs whose two classes happen to be one count as positives, as published

  def __post_init__(self):
    for name in ("classes", "images"):
      check(getattr(self, name) >= 2, name, getattr(self, name), "use at least 2")
    check(self.beta > 0, "beta", self.beta, "must be positive")
    check(self.lam >= 0, "lam", self.lam, "use 0 (the exact one) or a positive number")
    check(self.method != "gft" or self.beta < 1, "beta", self.beta, "gft needs one below 1")

  @property
  def scale(self) -> float:
    """Of the guidance that the method aims at."""
    return {"gft": 1 / self.beta - 1, "ddo": 0.0}.get(self.method, 1 / self.beta)


class World:
  """log p(x|c) [classes, images] of a seed, float64, and what follows from it."""

  def __init__(self, cfg: ToyConfig, seed: int):
    logits = CONTRAST * np.random.default_rng(seed).normal(size=(cfg.classes, cfg.images))
    self.cfg, self.log_p = cfg, _log_softmax(logits)
    self.log_marginal = np.log(np.exp(self.log_p).mean(0))
    # ddo's pretrained model has not learnt all of p yet
    self.log_start = _log_softmax(logits / 2) if cfg.method == "ddo" else self.log_p

  def guided(self, scale: float) -> np.ndarray:
    """log of p(x|c) (p(x|c)/p(x))^scale, normalised."""
    return _log_softmax(self.log_p + scale * (self.log_p - self.log_marginal))

  def log_lam(self) -> np.ndarray:
    """[classes]: log lambda. Where it is not given, beta log Z(c), at which the optimum is the target."""
    if self.cfg.lam:
      return np.full(self.cfg.classes, np.log(self.cfg.lam))
    if self.cfg.method != "cca":
      return np.zeros(self.cfg.classes)
    guided = self.log_p + self.cfg.scale * (self.log_p - self.log_marginal)
    return self.cfg.beta * np.log(np.exp(guided).sum(1))


def _log_softmax(x: np.ndarray) -> np.ndarray:
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


class Table(nnx.Module):
  """Logits [classes, images], from a log-probability."""

  def __init__(self, start: np.ndarray):
    self.logits = nnx.Param(jax.reshard(jnp.asarray(start), P(None, None)))


def expected_loss(world: World, logits: jax.Array) -> jax.Array:
  """The loss of a table of logits [classes, images], in expectation over images, classes and mismatched classes."""
  cfg = world.cfg
  p, log_q = jnp.exp(jnp.asarray(world.log_p)), jax.nn.log_softmax(logits)
  if cfg.method == "gft":
    mixed = cfg.beta * logits + (1 - cfg.beta) * world.log_marginal
    return -jnp.mean(jnp.sum(p * jax.nn.log_softmax(mixed), axis=1))
  gap, lam = log_q - world.log_start, jnp.exp(jnp.asarray(world.log_lam()))
  if cfg.method == "ddo":
    away = jnp.exp(world.log_start) * lam[:, None] * jax.nn.log_sigmoid(-cfg.beta * gap)
    return -jnp.mean(jnp.sum(p * jax.nn.log_sigmoid(cfg.beta * gap) + away, axis=1))
  # [class, other class, image]
  pos, neg = gap[:, None, :] + 0 * gap, gap[None] + 0 * gap[:, None]
  same = jnp.eye(cfg.classes, dtype=bool)[:, :, None] & cfg.collisions
  value = LOSSES[cfg.method](pos, neg, same, cfg.beta, lam[None, :, None])
  return jnp.mean(jnp.sum(p[:, None] * value, axis=-1))


def measures(world: World, logits: np.ndarray) -> dict[str, float]:
  """Of a model: how far from its target, which guidance it is most like, what it gives up for being sure.

  kl: E_c KL(p_theta || guidance of the method's scale), nats; scale: the guidance with the least
  KL, kl_scale that KL; fidelity: E log p(c|x) under the world; entropy: of p_theta(x|c), mean over classes.
  """
  log_q = _log_softmax(np.asarray(logits, np.float64))
  q = np.exp(log_q)
  kl = lambda log_p: float(np.mean(np.sum(q * (log_q - log_p), axis=1)))
  to_each = [kl(world.guided(s)) for s in SCALES]
  best = int(np.argmin(to_each))
  posterior = world.log_p - world.log_marginal - np.log(len(q))
  return {
    "kl": kl(world.guided(world.cfg.scale)),
    "scale": float(SCALES[best]),
    "kl_scale": to_each[best],
    "fidelity": float(np.mean(np.sum(q * posterior, axis=1))),
    "entropy": float(-np.mean(np.sum(q * log_q, axis=1))),
  }


def make(cfg: RunConfig, toy: ToyConfig) -> Experiment:
  """One model in one world."""
  world = World(toy, cfg.seed)

  def loss(model, batch, key):
    del key
    weight = jnp.sum(batch["weights"])  # batches tell nothing: the loss is exact
    return {"loss": Mean(weight * expected_loss(world, model.logits[...]), weight)}

  def data(split):
    rows = {"weights": np.ones(cfg.batch, np.float32)}
    return same_batch(rows, shard=batch_shard(jax.sharding.get_mesh()), train=split == "train")

  return Experiment(
    init=lambda key: Table(world.log_start),
    loss=loss,
    data=data,
    batch=lambda: {"weights": jax.ShapeDtypeStruct((cfg.batch,), jnp.float32)},
    tx=optim.make(cfg.tx, cfg.steps),
    evals={"toy": functools.partial(_measured, world)},
    # of each class against each other, for each image
    flops_per_token={"pairs": 10.0 * toy.classes**2 * toy.images},
    info=lambda: {"source": "toy", "classes": toy.classes, "images": toy.images},
  )


def _measured(world: World, model: Table) -> dict[str, float]:
  return measures(world, np.asarray(jax.device_get(model.logits[...])))
