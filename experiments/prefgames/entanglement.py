"""Gradient entanglement: whether a step raises the chosen log-probability and lowers the rejected one.

With g_w and g_l the gradients of the two log-probabilities, a step on any loss of their margin changes them, to first
order, by ("gradient entanglement", arXiv 2410.13828)

  chosen:  c (|g_w|^2 - <g_w, g_l>)      rejected:  c (<g_w, g_l> - |g_l|^2),      c > 0,

so that both go their ways only where <g_w, g_l> < min(|g_w|^2, |g_l|^2). Strings that share tokens have gradients that
share parameters. Here each run has a policy and one pair of its own, whose strings differ in some of their places, and
what the inner products say is held against what the step does. With both gradients normalised first (the paper's
remedy) neither can go the wrong way, to first order.
"""

import dataclasses
import functools
from typing import Literal

from flax import nnx
import jax
from jax import P
from jax import numpy as jnp
import numpy as np
import optax

from experiments.prefgames.strings import log_policy, start
from research.config import RunConfig
from research.data import same_batch
from research.errors import check
from research.fit import Experiment, TrainState
from research.mesh import BATCH, batch_shard, row_spec
from research.metrics import Mean
from research.preference import losses

STACK = P(BATCH, None, None)  # [runs, a policy's two axes]


@dataclasses.dataclass(frozen=True)
class PairConfig:
  """One pair a run: strings of `length` that differ in `differ` places, and the loss on them."""

  vocab: int = 8
  length: int = 12
  width: int = 8
  differ: int = 1
  loss: Literal["dpo", "ipo", "normalised"] = "dpo"
  b: float = 0.1
  rate: float = 0.01
  updates: int = 1  # in one step of the loop

  def __post_init__(self):
    check(self.vocab >= 2, "vocab", self.vocab, "use at least 2")
    check(1 <= self.differ <= self.length, "differ", self.differ, f"use 1 to {self.length}, the strings' length")
    for name in ("b", "rate"):
      check(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
    check(self.updates >= 1, "updates", self.updates, "use a whole number of at least 1")


class Policies(nnx.Module):
  """theta [runs, ...]."""

  def __init__(self, reference: np.ndarray):
    self.theta = nnx.Param(jax.reshard(jnp.asarray(reference), STACK))


@functools.lru_cache(maxsize=32)
def pairs(seed: int, count: int, vocab: int, length: int, width: int, differ: int) -> dict[str, np.ndarray]:
  """`count` rows: reference, a policy; strings int [2, length], the chosen and the rejected one."""
  rng = np.random.default_rng((13, seed))
  reference = start(rng, count, vocab, width)
  chosen = rng.integers(vocab, size=(count, length))
  at = rng.permuted(np.tile(np.arange(length), (count, 1)), axis=1) < differ
  rejected = (chosen + at * rng.integers(1, vocab, size=chosen.shape)) % vocab
  return {"reference": reference, "strings": np.stack([chosen, rejected], axis=1).astype(np.int32)}


def make(cfg: RunConfig, pair: PairConfig) -> Experiment:
  """`cfg.batch` runs, each of a policy and a pair of its own."""
  check(cfg.accumulate == 1, "accumulate", cfg.accumulate, "runs are not split into micro-batches; use 1")
  drawn = functools.partial(pairs, cfg.seed, cfg.batch, pair.vocab, pair.length, pair.width, pair.differ)

  def data(split):
    return same_batch(drawn(), shard=batch_shard(jax.sharding.get_mesh()), train=split == "train")

  def batch():
    like = jax.dtypes.canonicalize_dtype(np.float64)
    return {
      "reference": jax.ShapeDtypeStruct((cfg.batch, 2 * pair.vocab + 1, pair.width), like),
      "strings": jax.ShapeDtypeStruct((cfg.batch, 2, pair.length), jnp.int32),
    }

  return Experiment(
    init=lambda key: Policies(drawn()["reference"]),
    loss=functools.partial(_loss, pair),
    data=data,
    batch=batch,
    tx=optax.identity(),
    evals={"pairs": functools.partial(_summary, pair, drawn)},
    flops_per_token={"pairs": 4.0 * pair.updates * pair.vocab},
    info=lambda: {"source": "strings", "runs": cfg.batch, "differ": pair.differ},
    train_step=functools.partial(_train_step, pair),
  )


def direction(pair: PairConfig, theta: jax.Array, row) -> tuple[jax.Array, jax.Array]:
  """(the step, and the changes [2] of both log-probabilities that inner products say, over `rate`)."""
  of = functools.partial(log_policy, strings=row["strings"])
  g = jax.jacobian(of)(theta).reshape(2, -1)
  gram = g @ g.T
  reference = jax.lax.stop_gradient(of(row["reference"]))[None, :, None]
  loss = losses.ipo if pair.loss == "ipo" else losses.dpo
  ones = jnp.ones_like(reference)
  value = lambda logp: loss(logp[None, :, None], reference, jnp.ones(1, logp.dtype), ones, b=pair.b)[0]
  weights = -jax.grad(value)(of(theta))  # (c, -c): a loss of the margin
  if pair.loss == "normalised":
    norms = jnp.sqrt(jnp.diag(gram))
    weights = weights * jnp.mean(norms) / norms
  return (weights @ g).reshape(theta.shape), weights @ gram


def _train_step(pair: PairConfig, exp: Experiment, cfg: RunConfig, state: TrainState, batch, reference=None):
  """`pair.updates` updates in every run. Returns (state, metrics)."""
  del exp, cfg, reference
  rows = jax.tree.map(lambda x: row_spec(x.ndim), batch)

  def run(theta, batch):
    one = lambda theta, _: (theta + pair.rate * jax.vmap(functools.partial(direction, pair))(theta, batch)[0], None)
    return jax.lax.scan(one, theta, length=pair.updates)[0]

  before = state.model.theta[...]
  theta = jax.shard_map(run, in_specs=(STACK, rows), out_specs=STACK, check_vma=False)(before, batch)
  model = jax.tree.map(lambda _: theta, state.model)
  size = jnp.sqrt(jnp.sum((theta - before) ** 2))
  metrics = {"loss": _loss(pair, model, batch, None)["loss"].value, "update_norm": size}
  return TrainState(state.step + 1, model, state.opt, state.key), metrics | {"grad_norm": size / pair.updates}


def _loss(pair: PairConfig, model: Policies, batch, key) -> dict[str, Mean]:
  """-log sigmoid of the margin over the reference: the same number for every loss."""
  del key
  of = jax.vmap(log_policy)
  d = of(model.theta[...], batch["strings"]) - of(batch["reference"], batch["strings"])
  return {"loss": losses.over_rows(jax.nn.softplus(d[:, 1] - d[:, 0]))}


def measures(pair: PairConfig, theta: jax.Array, row) -> dict[str, jax.Array]:
  """[2] each, chosen and rejected, of one run: what inner products say of the next step, what it does, what all did.

  The first two are changes of log-probabilities over `rate`.
  """
  of = functools.partial(log_policy, strings=row["strings"])
  step, predicted = direction(pair, theta, row)
  now = of(theta)
  moved = (of(theta + pair.rate * step) - now) / pair.rate
  return {"predicted": predicted, "moved": moved, "since": now - of(row["reference"])}


def _summary(pair: PairConfig, drawn, model: Policies) -> dict[str, float]:
  """Shares of runs, and means over them."""
  theta = np.asarray(jax.jit(jax.reshard, static_argnums=1)(model.theta[...], P(None, None, None)))
  found = {name: np.asarray(x) for name, x in _compiled(pair)(theta, drawn()).items()}
  predicted, moved, since = (found[name] for name in ("predicted", "moved", "since"))
  wrong = lambda x: (x[:, 0] < 0) | (x[:, 1] > 0)
  return {
    "predicted_wrong": wrong(predicted).mean(),
    "wrong": wrong(moved).mean(),
    "signs_predicted": (np.sign(predicted) == np.sign(moved)).mean(),
    "chosen_below_start": (since[:, 0] < 0).mean(),
    "chosen": since[:, 0].mean(),
    "rejected": since[:, 1].mean(),
  }


@functools.lru_cache(maxsize=8)
def _compiled(pair: PairConfig):
  return jax.jit(jax.vmap(functools.partial(measures, pair)))
