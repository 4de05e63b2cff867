"""Training on preferences that are asked for while it goes on: the parts of an `Experiment` for any decoder of the zoo.

One step of the loop is one program: both players write responses to the batch's prompts (prefill, then a token a step
from their caches, no step passing through the host), the oracle is asked, policy and reference score what was
written, and the row's loss and update move the policy. Nothing beyond the first stop id, and no padding, is read.

  batch: prompts int32 [batch, length], padded on the left; lengths int32 [batch], without the padding; where rows are
    padding themselves, weights float32 [batch]; and whatever the oracle needs to know, [batch, ...].
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import inspect
from typing import Any, Literal, NamedTuple

import jax
from jax import P
from jax import numpy as jnp
import optax

from research.config import RunConfig
from research.errors import check
from research.fit import Experiment, TrainState, accumulated, unless_nonfinite
from research.generation import Sampling
from research.kernels.dispatch import place
from research.mesh import row_spec, to_devices
from research.metrics import Mean
from research.models.decoder import Decoder
from research.preference import methods, oracles, updates
from research.preference.methods import METHODS, Method
from research.preference.oracles import Oracle
from research.preference.samplers import GeometricMixture, Policy, Uniform, draw


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
  """A row of `methods.METHODS`, and how it is played. Raises UserError."""

  method: Literal[*METHODS] = "egpo"
  b: float = 0.1  # the weight of the KL term; SPPO's 1 / eta
  tokens: int = 64  # new ones a response at most, the stop id included
  updates: int = 1  # in one step of the loop, all on the batch's prompts
  # who stands for uniform responses: the policy, flattened and cut as EGPO has it, or uniform ids themselves
  pairs: Literal["flat", "uniform"] = "flat"
  temperature: float = 2.0
  top_k: int = 10
  mixture: float = 0.125  # the reference's share in Nash-MD's opponent
  hard: bool = False  # preferences are wins and losses, not probabilities
  reduce: Literal["sum", "mean"] = "sum"  # of a response's log-probabilities, see `losses`
  alpha: float = 1e-5  # XPO's bonus
  memory: int = 0  # batches of pairs that are kept; an update draws its own from them; 0: the new pairs only
  refresh: int = 0  # every so many updates the policy becomes the reference of the loss; 0: never

  def __post_init__(self):
    check(self.b > 0, "b", self.b, "must be positive")
    for name in ("tokens", "updates"):
      check(getattr(self, name) >= 1, name, getattr(self, name), "use a whole number of at least 1")
    for name in ("memory", "refresh"):
      check(getattr(self, name) >= 0, name, getattr(self, name), "use 0 or a positive whole number")
    kept = self.memory == 0 or METHODS[self.method].update == "plain"
    check(kept, "memory", self.memory, f"{self.method} needs pairs against its opponent of the moment; use 0")
    self.row()  # what is wrong with a sampler
    whole = self.reduce == "sum" or "reduce" in self.options()
    check(whole, "reduce", self.reduce, f"{self.method} is of whole responses; use sum")

  def row(self) -> Method:
    """The method's row with these samplers."""
    flat = Uniform() if self.pairs == "uniform" else Policy(Sampling(self.temperature, self.top_k))

    def of(sampler):
      if isinstance(sampler, GeometricMixture):
        return dataclasses.replace(sampler, coefficient=self.mixture)
      return flat if sampler == methods.FLAT else sampler

    row = METHODS[self.method]
    return dataclasses.replace(row, y=of(row.y), y2=of(row.y2), opponent=of(row.opponent))

  def options(self) -> dict[str, Any]:
    """What the row's loss takes beside b."""
    takes = inspect.signature(METHODS[self.method].loss).parameters
    return {name: getattr(self, name) for name in ("reduce", "alpha") if name in takes}


class Kept(NamedTuple):
  """What a run keeps beside the policy, as `TrainState.opt`: a restart goes on with it."""

  opt: Any  # of the optax transformation
  anchor: Any  # the reference that `refresh` moves; (): none
  pairs: Any  # a ring of `memory` batches of pairs; (): none
  updates: jax.Array  # int32, made so far


def parts(
  online: OnlineConfig,
  tx: optax.GradientTransformation,
  oracle: Callable[[Any], Oracle],
  batch: Callable[[], Mapping[str, jax.ShapeDtypeStruct]],
  data: Callable[[str], Any],
  stop: tuple[int, ...] = (),
) -> dict[str, Any]:
  """The fields `loss`, `tx`, `train_step`, `reference` and `check_start` of an `Experiment` that trains by `online`.

  tx: counts updates, `online.updates` of which make a step of the loop. oracle: the experiment's `companion` (None
  if it has none) -> the oracle, which sees a batch as its prompts and `samplers.Responses` as y. batch: the
  experiment's, and data too. The loss is the row's on responses of the model itself, as before an update. A run whose
  oracle breaks its contract does not start.
  """
  tx = updates.remembering(tx) if METHODS[online.method].update == "optimistic" else tx

  def init(model):
    anchor = jax.tree.map(jnp.zeros_like, model) if online.refresh else ()  # filled by the first update
    pairs = _empty(online, batch()) if online.memory else ()
    return Kept(tx.init(model), anchor, pairs, jnp.zeros((), jnp.int32))

  def loss(model, batch, key, reference):
    reference, companion = reference if isinstance(reference, tuple) else (reference, None)
    made = methods.rollout(
      online.row(), oracle(companion), model, reference, batch, key, tokens=online.tokens, stop=stop, hard=online.hard
    )
    return _loss(online, model, reference, made)

  def check_start(model, reference):
    companion = reference[1] if isinstance(reference, tuple) else None
    rows = to_devices(next(iter(data("train"))))
    write = jax.jit(functools.partial(draw, Uniform(), model, model, tokens=online.tokens, stop=stop))
    y, y2 = (write(rows["prompts"], rows["lengths"], key) for key in jax.random.split(jax.random.key(0)))
    oracles.checked(oracle(companion), rows, y, y2)

  return {
    "loss": loss,
    "tx": optax.GradientTransformation(init, tx.update),
    "train_step": functools.partial(train_step, online, tx, oracle, stop),
    "reference": True,
    "check_start": check_start,
  }


def train_step(
  online: OnlineConfig,
  tx: optax.GradientTransformation,
  oracle: Callable[[Any], Oracle],
  stop: tuple[int, ...],
  exp: Experiment,
  cfg: RunConfig,
  state: TrainState,
  batch: Mapping[str, jax.Array],
  reference: Any,
):
  """`online.updates` updates on one batch of prompts. Returns (state, metrics), those of the last update.

  state.opt: `Kept`. The gradient of an update is taken in `cfg.accumulate` micro-batches, responses are written to
  all prompts at once.
  """
  reference, companion = reference if exp.companion is not None else (reference, None)
  key = jax.random.fold_in(state.key, state.step)

  def one(carry, key):
    policy, kept = carry
    anchor, against = kept.anchor, reference
    if online.refresh:
      now = kept.updates % online.refresh == 0
      anchor = against = jax.tree.map(lambda new, old: jnp.where(now, new, old), policy, anchor)
    gradient_ = gradient(
      online, oracle(companion), against, batch, stop, cfg.accumulate, functools.partial(_recall, online, kept)
    )
    moved, opt, (means, pairs, size) = updates.UPDATES[online.row().update](gradient_, tx, policy, kept.opt, key)
    metrics = {name: mean.value for name, mean in means.items()} | {"grad_norm": size}
    return (moved, Kept(opt, anchor, pairs, kept.updates + 1)), metrics

  carry = (state.model, state.opt)
  if online.updates == 1:
    carry, metrics = one(carry, key)
  else:
    carry, metrics = jax.lax.scan(one, carry, jax.random.split(key, online.updates))
    metrics = jax.tree.map(lambda x: x[-1], metrics)
  model, kept = carry
  new = TrainState(state.step + 1, model, kept, state.key)
  metrics["update_norm"] = optax.tree.norm(jax.tree.map(jnp.subtract, model, state.model))
  metrics["queries"] = kept.updates.astype(jnp.float32) * (online.row().queries * cfg.batch)
  return unless_nonfinite(cfg, state, new, metrics), metrics


def gradient(
  online: OnlineConfig,
  oracle: Oracle,
  reference: Decoder,
  batch: Mapping[str, jax.Array],
  stop: tuple[int, ...] = (),
  accumulate: int = 1,
  recall: Callable[[Any, jax.Array], Any] = lambda made, key: (made, ()),
) -> updates.Gradient:
  """The row's gradient, as `updates` takes it, that comes with (means of the loss, `recall`'s keepsake, norm).

  Who opposes writes all responses that the policy would, as in EGPO's public code; gradients reach neither them nor
  the reference. recall: (this update's pairs, key) -> (the pairs to learn from, what to keep).
  """

  def f(policy, opponent, key):
    keys = jax.random.split(key, 3)
    made = methods.rollout(
      online.row(), oracle, opponent, reference, batch, keys[0], tokens=online.tokens, stop=stop, hard=online.hard
    )
    made, kept = recall(_learned_from(made), keys[1])
    loss = lambda policy, made, key: _loss(online, policy, reference, made)
    grads, means = accumulated(loss, policy, jax.lax.stop_gradient(made), keys[2], accumulate)
    return grads, (means, kept, optax.tree.norm(grads))

  return f


def _loss(online: OnlineConfig, policy: Decoder, reference: Decoder, made: Mapping[str, jax.Array]) -> dict[str, Mean]:
  made = made | {"reference": jax.lax.stop_gradient(methods.scored(reference, made))}
  return methods.loss(online.row(), policy, made, b=online.b, weights=made.get("weights"), **online.options())


def _learned_from(made: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """What the loss reads of a rollout, cut along the batch."""
  names = ("prompts", "lengths", "responses", "mask", "preference", "weights")
  return {name: _cut(made[name]) for name in names if name in made}


def _cut(x: jax.Array) -> jax.Array:
  return place(x, row_spec(x.ndim))


def _whole(x: jax.Array) -> jax.Array:
  return place(x, P(*[None] * x.ndim))


def _empty(online: OnlineConfig, batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """A ring of pairs without any."""
  row = online.row()
  rows = batch["prompts"].shape[0]
  responses = (rows, 1 if row.y2 is None else 2, online.tokens)
  preference = (rows, 2) if row.opponent is not None and row.y2 is not None else (rows,)
  shapes = {"responses": (responses, jnp.int32), "mask": (responses, jnp.float32)}
  shapes["preference"] = (preference, jnp.float32)
  shapes |= {name: (x.shape, x.dtype) for name, x in batch.items() if name in ("prompts", "lengths", "weights")}
  return {name: jnp.zeros((online.memory * s[0], *s[1:]), dtype) for name, (s, dtype) in shapes.items()}


def _recall(online: OnlineConfig, kept: Kept, made: dict[str, jax.Array], key: jax.Array):
  """(as many rows, drawn from all pairs so far, these among them; the pairs with these)."""
  if not online.memory:
    return made, ()
  rows = made["prompts"].shape[0]
  at = kept.updates % online.memory * rows
  put = lambda ring, new: jax.lax.dynamic_update_slice_in_dim(ring, _whole(new).astype(ring.dtype), at, 0)
  pairs = jax.tree.map(put, kept.pairs, made)
  held = jnp.minimum(kept.updates + 1, online.memory) * rows
  chosen = jax.random.randint(key, (rows,), 0, held)
  return jax.tree.map(lambda ring: _cut(ring[chosen]), pairs), pairs
