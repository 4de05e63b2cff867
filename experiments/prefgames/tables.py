"""Finite games, many at once: a policy a game and a step size, all moved by one method of the library's table.

The model is the stack of policies, a row of data a game, and a step of the loop `updates` updates of every policy in
one compiled loop. Games know nothing of each other, so devices share them out.
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

from experiments.prefgames.games import KINDS, draw
from research.config import RunConfig
from research.data import same_batch
from research.errors import check
from research.fit import Experiment, TrainState
from research.mesh import BATCH, batch_shard, row_spec
from research.metrics import Mean
from research.preference import games, tabular, updates
from research.preference.tabular import METHODS

FAILED = 1e-3  # a game whose gap stays above this has failed
STACK = P(None, BATCH, None)  # [rates, games, n]

RULES = {
  "own": lambda: None,
  "sgd": lambda: optax.sgd(1.0),
  "momentum": lambda: optax.sgd(1.0, momentum=0.9),
  "adam": lambda: optax.adam(1.0),
  "adam_b1_0": lambda: optax.adam(1.0, b1=0.0),
  "optimistic": lambda: optax.optimistic_gradient_descent(1.0),
  "optimistic_adam": lambda: optax.optimistic_adam_v2(1.0),
}


@dataclasses.dataclass(frozen=True)
class TableConfig:
  """Which games, and how their policies move.

  `rates` are the eta of the method's own update; with another `rule` they are that optimiser's learning rates, on the
  gradient of the squared loss, for which plain SGD's is eta b n / 4.
  """

  kinds: tuple[Literal[*KINDS], ...] = ("uniform",)
  method: Literal[*METHODS] = "egpo"
  b: float = 0.01
  rates: tuple[float, ...] = (0.8,)
  decay: bool = False  # eta / (1 + eta b t) at update t
  updates: int = 50  # in one step of the loop
  samples: int = 0  # of each estimate; 0: expectations
  hard: bool = False  # sampled preferences are wins and losses, not probabilities
  rule: Literal[*RULES] = "own"

  def __post_init__(self):
    check(len(self.kinds) > 0, "kinds", self.kinds, f"choose from {', '.join(KINDS)}")
    check(self.b > 0, "b", self.b, "must be positive; methods of the original game leave it out by themselves")
    check(len(self.rates) > 0 and min(self.rates) > 0, "rates", self.rates, "give positive step sizes")
    check(self.updates >= 1, "updates", self.updates, "use a whole number of at least 1")
    check(self.samples >= 0, "samples", self.samples, "use 0 (expectations) or a number of samples")
    updates = (tabular.plain, tabular.extragradient)
    mixes = METHODS[self.method].opponent is tabular.mixture and self.rule == "own"
    fix = "times b is the reference's share in this method's mixture, in [0, 1]"
    check(not mixes or max(self.rates) * self.b <= 1, "rates", self.rates, fix)
    fix = f"{self.method}'s update is not a gradient step; use rule=own"
    check(self.rule == "own" or METHODS[self.method].update in updates, "rule", self.rule, fix)
    check(self.rule == "own" or not self.decay, "decay", self.decay, "optimisers keep their rate; use rule=own")

  @property
  def queries(self) -> int:
    """Preferences that an update of one policy asks for; with expectations, of each sample there would be."""
    return METHODS[self.method].queries * max(self.samples, 1)


class Policies(nnx.Module):
  """theta [rates, games, n], logits; anchor, what the method keeps beside it; total, the sum of the policies played."""

  def __init__(self, log_reference: np.ndarray, rates: int):
    start = np.broadcast_to(log_reference, (rates, *log_reference.shape))
    start = jax.reshard(jnp.asarray(start - start.mean(-1, keepdims=True)), STACK)
    self.theta, self.anchor = nnx.Param(start), nnx.Param(start)
    self.total = nnx.Param(jnp.zeros_like(start))


def make(cfg: RunConfig, table: TableConfig) -> Experiment:
  """`cfg.batch` games of `cfg.length` responses, and their policies."""
  check(cfg.accumulate == 1, "accumulate", cfg.accumulate, "games are not split into micro-batches; use 1")
  mixes = METHODS[table.method].opponent is tabular.mixture and table.rule != "own"
  fix = f"times 4 / length={cfg.length} is the reference's share in this method's mixture, in [0, 1]"
  check(not mixes or 4 * max(table.rates) <= cfg.length, "table.rates", table.rates, fix)
  load = functools.partial(draw, table.kinds, cfg.seed, cfg.batch, cfg.length, table.b)
  rule = RULES[table.rule]()
  each = lambda steps, theta: steps * jnp.asarray(table.rates, theta.dtype)[:, None, None]
  tx = optax.chain(rule, optax.stateless(each)) if rule else None
  everywhere = jax.jit(functools.partial(_everywhere, table))

  def data(split):
    rows = load() | {"game": np.arange(cfg.batch, dtype=np.int32)}
    return same_batch(rows, shard=batch_shard(jax.sharding.get_mesh()), train=split == "train")

  def batch():
    size, n = cfg.batch, cfg.length
    shapes = {"preferences": (size, n, n), "log_reference": (size, n), "log_equilibrium": (size, n)}
    like = jax.dtypes.canonicalize_dtype(np.float64)
    found = {name: jax.ShapeDtypeStruct(shape, like) for name, shape in shapes.items()}
    return found | {"game": jax.ShapeDtypeStruct((size,), jnp.int32)}

  def info():
    load()
    return {"source": " and ".join(table.kinds), "games": cfg.batch, "responses": cfg.length}

  return Experiment(
    init=lambda key: Policies(load()["log_reference"], len(table.rates)),
    loss=functools.partial(_loss, table),
    data=data,
    batch=batch,
    tx=optax.GradientTransformation(lambda model: tx.init(model.theta[...]) if tx else (), optax.identity().update),
    evals={kind: functools.partial(_summary, table, load, everywhere, i) for i, kind in enumerate(table.kinds)},
    flops_per_token={"win rates": 2.0 * cfg.length * len(table.rates) * table.updates * fields(table.method)},
    info=info,
    train_step=functools.partial(_train_step, table, tx),
  )


def fields(method: str) -> int:
  """How many win-rate vectors P pi an exact update of a method computes."""
  return 2 if METHODS[method].update is tabular.extragradient else 1


def _train_step(table: TableConfig, tx, exp: Experiment, cfg: RunConfig, state: TrainState, batch, reference=None):
  """`table.updates` updates of every policy. Returns (state, metrics)."""
  del exp, cfg, reference
  model = state.model
  key = jax.random.fold_in(state.key, state.step)
  games_spec = jax.tree.map(lambda x: row_spec(x.ndim), batch)
  opt_spec = jax.tree.map(lambda x: STACK if x.ndim == 3 else P(), state.opt)
  # moments stand on every device between steps
  moved = (model.theta[...], model.anchor[...], model.total[...], jax.tree.map(jax.reshard, state.opt, opt_spec))
  specs = (STACK, STACK, STACK, opt_spec)
  run = jax.shard_map(
    functools.partial(_updates, table, tx), in_specs=(specs, games_spec, P(), P()), out_specs=specs, check_vma=False
  )
  theta, anchor, total, opt = run(moved, batch, key, state.step * table.updates)
  opt = jax.tree.map(lambda x: jax.reshard(x, P(*[None] * x.ndim)), opt)
  new = jax.tree.unflatten(jax.tree.structure(model), _in_order(model, theta, anchor, total))
  before, after = (_measures(table, t, batch)["kl"] for t in (model.theta[...], theta))
  size = jnp.sqrt(jnp.sum((theta - model.theta[...]) ** 2))
  metrics = {"loss": _mean(_measures(table, theta, batch)["gap"]).value}
  metrics |= {"update_norm": size, "grad_norm": size / table.updates}
  metrics |= _by_rate(table, "contraction", _contraction(before, after))
  return TrainState(state.step + 1, new, opt, state.key), metrics


def _in_order(model: Policies, theta, anchor, total) -> list[jax.Array]:
  values = {"theta": theta, "anchor": anchor, "total": total}
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(model)]
  return [values[path[0].name] for path in paths]


def _updates(table: TableConfig, tx, moved, batch, key: jax.Array, first: jax.Array):
  """The updates `first`, first + 1, ... of one device's games: moved = (theta, anchor, total, optimiser's state)."""
  method = METHODS[table.method]
  sampled = tabular.Sampled(table.samples, table.hard) if table.samples else None
  rates = jnp.asarray(table.rates, batch["preferences"].dtype)
  b = jnp.asarray(table.b, rates.dtype)
  n = batch["preferences"].shape[-1]

  def per_game(key):
    return jax.vmap(functools.partial(jax.random.fold_in, key))(batch["game"])

  def every(f):  # over games, then over rates; f takes (game, theta, other, rate, key)
    g = lambda p, r, *rest: f(tabular.Game(p, r, b), *rest)
    g = jax.vmap(g, (0, 0, 0, 0, None, 0))
    g = jax.vmap(g, (None, None, 0, 0, 0, None))
    return functools.partial(g, batch["preferences"], batch["log_reference"])

  def one(moved, i):
    theta, anchor, total, opt = moved
    key_now = jax.random.fold_in(key, i)
    total = total + jax.nn.softmax(theta)
    if tx is None:

      def update(game, theta, anchor, eta, key):
        eta = eta / (1 + eta * b * (first + i)) if table.decay else eta
        start = dataclasses.replace(tabular.start(theta), anchor=anchor, step=first + i)
        end = method(game, start, eta, key, sampled)
        return end.theta, end.anchor

      theta, anchor = every(update)(theta, anchor, rates, per_game(key_now))
      return (theta, anchor, total, opt), None

    def field(game, theta, other, eta, key):
      eta = eta * 4 / (b * n)  # for the opponents that know of it
      return method.field(game, theta, method.opponent(game, other, eta), key, sampled)

    def gradient(theta, other, key):
      return -4 / (b * n) * every(field)(theta, other, rates, per_game(key)), None

    update = updates.extragradient if method.update is tabular.extragradient else updates.plain
    theta, opt, _ = update(gradient, tx, theta, opt, key_now)
    return (theta - jnp.mean(theta, axis=-1, keepdims=True), anchor, total, opt), None

  return jax.lax.scan(one, moved, jnp.arange(table.updates, dtype=first.dtype))[0]


def _measures(table: TableConfig, theta: jax.Array, batch) -> dict[str, jax.Array]:
  """[rates, games] each: the duality gap, KL(equilibrium || policy), and the original game's gap."""
  log_policy = jax.nn.log_softmax(theta)
  q = games.win_rates(batch["preferences"][None], log_policy)
  return {
    "gap": games.duality_gap(log_policy, batch["log_reference"][None], q, table.b),
    "kl": games.kl(batch["log_equilibrium"][None], log_policy),
    "original": games.original_gap(q),
  }


def _contraction(before: jax.Array, after: jax.Array) -> jax.Array:
  """[rates]: the largest ratio over games of KL(equilibrium || policy) after a step of the loop to that before.

  EGPO's theorem has (1 - eta b) for one update. Games at the equilibrium but for rounding are left out.
  """
  ratio = jnp.where(before > 1e-10, after / jnp.maximum(before, 1e-10), 0)
  return jnp.max(jnp.nan_to_num(ratio, nan=jnp.inf), axis=1)


def _loss(table: TableConfig, model: Policies, batch, key) -> dict[str, Mean]:
  """The mean duality gap over games and rates; one that is not finite, or above 1, counts as 1."""
  del key
  return {"loss": _mean(_measures(table, model.theta[...], batch)["gap"])}


def _mean(gap: jax.Array) -> Mean:
  gap = jnp.minimum(jnp.nan_to_num(gap, nan=1.0), 1.0)
  return Mean(jnp.sum(gap), jnp.asarray(gap.size, gap.dtype))


def _summary(table: TableConfig, load, everywhere, kind: int, model: Policies) -> dict[str, np.ndarray]:
  """For each rate, of the games of one kind: medians, and the share of games that failed."""
  found = {name: np.asarray(x) for name, x in everywhere(model, load()).items()}
  size = found["gap"].shape[1] // len(table.kinds)
  found = {name: x[:, kind * size : (kind + 1) * size] for name, x in found.items()}
  failed = ~(found["gap"] <= FAILED)  # written so that NaN fails too
  out = {name: np.median(np.nan_to_num(x, nan=np.inf), axis=1) for name, x in found.items()} | {
    "failed": failed.mean(1)
  }
  return {key: x for name, values in out.items() for key, x in _by_rate(table, name, values).items()}


def _everywhere(table: TableConfig, model: Policies, rows) -> dict[str, jax.Array]:
  """`_measures` of every policy, and the original game's gap of the average policies, on every device."""
  theta, total = (jax.reshard(x[...], P(None, None, None)) for x in (model.theta, model.total))
  average = total + jax.nn.softmax(theta)
  q = games.win_rates(rows["preferences"][None], jnp.log(average / jnp.sum(average, axis=-1, keepdims=True)))
  return _measures(table, theta, rows) | {"original_average": games.original_gap(q)}


def _by_rate(table: TableConfig, name: str, values) -> dict:
  """{"name@rate": value}; of a single rate, {name: value}."""
  if len(table.rates) == 1:
    return {name: values[0]}
  return {f"{name}@{rate:g}": values[i] for i, rate in enumerate(table.rates)}
