"""Exploration where the reference rarely plays the good response: how many comparisons until a policy is good.

Response 0 has reward 1/2, one of the others 1, the rest 0; labels are Bradley-Terry's of the rewards. With one good
response of D rare ones, of exp(-1 / (8 b)) together under the reference, online DPO waits for the reference to show one
(XPO, arXiv 2405.21046, has the construction for D = 1 from memory of its proposition 2.1; D and the lock are ours).
The combination lock is the token-level version: strings of `size` bits, each 1 with probability 0.1 under the
reference; the string of zeros has reward 1/2, and the one that opens is all ones.
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

from research.config import RunConfig
from research.data import same_batch
from research.errors import check
from research.fit import Experiment, TrainState
from research.mesh import BATCH, batch_shard, row_spec
from research.metrics import Mean
from research.preference import games
from research.preference.comparisons import Comparisons, observed, xpo_objective

CLOSE = 1 / 8  # a policy is good when its J is this close to the best
ONE = 0.1  # the reference's probability of a 1 in the lock
# The second response's sampler, and the bonus's sign.
ALGORITHMS = {
  "dpo_own": ("policy", 0.0),
  "dpo_reference": ("reference", 0.0),
  "xpo": ("reference", 1.0),
  "xpo_flipped": ("reference", -1.0),
  "uniform": ("uniform", 0.0),  # both responses uniform: no policy is asked
}


@dataclasses.dataclass(frozen=True)
class BanditConfig:
  """What is played, by which algorithm, over which policies.

  policies: "class" is the finite class {reference, best if no rare response is good, best if response k is good}
  and its exact argmin; "softmax" a free logit a response, "tokens" (of the lock) a free logit a prefix, both by
  `inner` gradient steps a comparison at the learning rate `rate` / b^2.
  """

  kind: Literal["arms", "lock"] = "arms"
  size: int = 8  # rare responses; the lock's bits
  bs: tuple[float, ...] = (0.03, 0.02, 0.015)
  algorithm: Literal[*ALGORITHMS] = "xpo"
  alpha: float = 0.01  # the bonus's weight over b; the theorem's falls with the root of the budget
  policies: Literal["class", "softmax", "tokens"] = "class"
  inner: int = 4
  rate: float = 1.0
  updates: int = 40  # comparisons in one step of the loop

  def __post_init__(self):
    check(self.size >= 1, "size", self.size, "use at least 1")
    check(self.kind == "arms" or self.size <= 10, "size", self.size, "a lock of more than 10 bits is too large a table")
    check(len(self.bs) > 0 and min(self.bs) > 0, "bs", self.bs, "give positive weights of the KL term")
    check(self.alpha >= 0, "alpha", self.alpha, "must not be negative; algorithm=xpo_flipped turns the sign")
    check(self.policies != "tokens" or self.kind == "lock", "policies", self.policies, "only the lock has tokens")
    for name in ("inner", "updates"):
      check(getattr(self, name) >= 1, name, getattr(self, name), "use a whole number of at least 1")

  @property
  def responses(self) -> int:
    return self.size + 1 if self.kind == "arms" else 2**self.size

  def log_references(self) -> np.ndarray:
    """[bs, responses]."""
    if self.kind == "lock":
      ones = np.array([i.bit_count() for i in range(self.responses)])
      log_reference = ones * np.log(ONE) + (self.size - ones) * np.log1p(-ONE)
      return np.broadcast_to(log_reference, (len(self.bs), self.responses))
    rare = np.exp(-1 / (8 * np.array(self.bs)))[:, None]
    return np.hstack([np.log1p(-rare), np.repeat(np.log(rare / self.size), self.size, axis=1)])

  def rewards(self, seed: int, runs: int) -> np.ndarray:
    """[runs, responses]; which rare response is good is drawn for each run, and in the lock it is the last."""
    good = np.full(runs, self.responses - 1)
    if self.kind == "arms":
      good = np.random.default_rng((seed, 7)).integers(1, self.responses, size=runs)
    return hypotheses(self.responses)[good]

  def log_class(self) -> np.ndarray:
    """[bs, responses + 1, responses]: the reference, then the best policy of each of `hypotheses`."""
    log_r = self.log_references()[:, None]
    logits = log_r + hypotheses(self.responses) / np.array(self.bs)[:, None, None]
    best = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return np.concatenate([log_r, best], axis=1)


def hypotheses(responses: int) -> np.ndarray:
  """Rewards [responses, responses]: row 0, no rare response is good; row k, response k is."""
  h = np.eye(responses)
  h[:, 0] = 0.5
  return h


class Learners(nnx.Module):
  """What each run has learnt, [bs, runs, ...]: sums of losses over a class and its incumbent, or logits and data.

  first: after how many comparisons its policy was first good; -1: not yet.
  """

  def __init__(self, cfg: BanditConfig, runs: int):
    n, lead = cfg.responses, (len(cfg.bs), runs)
    zeros = lambda *shape, dtype=None: nnx.Param(jnp.zeros((*lead, *shape), dtype, out_sharding=_spec(len(shape) + 2)))
    if cfg.policies == "class":
      self.losses, self.incumbent = zeros(n + 1), zeros(dtype=jnp.int32)
    else:
      self.theta = nnx.Param(jax.reshard(_start(cfg, runs), _spec(3)))
      self.wins, self.second = zeros(n, n), zeros(n)
    self.first = nnx.Param(zeros(dtype=jnp.int32)[...] - 1)


def _start(cfg: BanditConfig, runs: int) -> jax.Array:
  """The reference's logits: of every response or, after every prefix, of a 1 against a 0."""
  log_r = cfg.log_references()
  if cfg.policies == "tokens":
    log_r = np.full((len(cfg.bs), cfg.responses - 1), np.log(ONE / (1 - ONE)))
  return jnp.asarray(np.repeat(log_r[:, None], runs, axis=1))


def token_log_policy(theta: jax.Array) -> jax.Array:
  """Log-probabilities [2^H] of all strings of H bits, first bit the highest, from logits [2^H - 1] of their prefixes.

  Prefixes stand in breadth-first order: the empty one, 0, 1, 00, 01, ...
  """
  log_p, at, width = jnp.zeros(1, theta.dtype), 0, 1
  while at < theta.shape[0]:
    bits = theta[at : at + width]
    log_p = jnp.stack([log_p + jax.nn.log_sigmoid(-bits), log_p + jax.nn.log_sigmoid(bits)], axis=1).reshape(-1)
    at, width = at + width, 2 * width
  return log_p


def make(cfg: RunConfig, bandit: BanditConfig) -> Experiment:
  """`cfg.batch` independent runs for every b of `bandit.bs`."""
  check(cfg.accumulate == 1, "accumulate", cfg.accumulate, "runs are not split into micro-batches; use 1")
  rewards = functools.partial(bandit.rewards, cfg.seed, cfg.batch)

  def data(split):
    rows = {"rewards": rewards(), "run": np.arange(cfg.batch, dtype=np.int32)}
    return same_batch(rows, shard=batch_shard(jax.sharding.get_mesh()), train=split == "train")

  def batch():
    like = jax.dtypes.canonicalize_dtype(np.float64)
    shape = (cfg.batch, bandit.responses)
    return {"rewards": jax.ShapeDtypeStruct(shape, like), "run": jax.ShapeDtypeStruct(shape[:1], jnp.int32)}

  return Experiment(
    init=lambda key: Learners(bandit, cfg.batch),
    loss=functools.partial(_loss, bandit),
    data=data,
    batch=batch,
    tx=optax.identity(),
    evals={"runs": functools.partial(_summary, bandit)},
    flops_per_token={"scores": 4.0 * len(bandit.bs) * bandit.updates},
    info=lambda: {"source": bandit.kind, "runs": cfg.batch, "responses": bandit.responses},
    train_step=functools.partial(_train_step, bandit),
  )


def _train_step(bandit: BanditConfig, exp: Experiment, cfg: RunConfig, state: TrainState, batch, reference=None):
  """`bandit.updates` comparisons in every run. Returns (state, metrics)."""
  del exp, cfg, reference
  leaves, tree = jax.tree.flatten(state.model)
  specs = jax.tree.unflatten(tree, [_spec(x.ndim) for x in leaves])
  rows = jax.tree.map(lambda x: row_spec(x.ndim), batch)
  run = functools.partial(_comparisons, bandit)
  run = jax.shard_map(run, in_specs=(specs, rows, P(), P()), out_specs=specs, check_vma=False)
  key = jax.random.fold_in(state.key, state.step)
  model = run(state.model, batch, key, state.step * bandit.updates)
  change = [jnp.sum((a - b) ** 2.0) for a, b in zip(jax.tree.leaves(model), leaves, strict=True)]
  size = jnp.sqrt(functools.reduce(jnp.add, change))
  metrics = {"loss": _loss(bandit, model, batch, key)["loss"].value, "update_norm": size}
  metrics["grad_norm"] = size / bandit.updates
  return TrainState(state.step + 1, model, state.opt, state.key), metrics


def _comparisons(bandit: BanditConfig, model: Learners, batch, key: jax.Array, done: jax.Array) -> Learners:
  like = batch["rewards"].dtype
  bs, log_r = jnp.asarray(bandit.bs, like), jnp.asarray(bandit.log_references(), like)
  log_class = jnp.asarray(bandit.log_class(), like)
  tables = (bs, log_r, log_class, log_class - log_r[:, None])
  step = _class_step if bandit.policies == "class" else _gradient_step
  every = jax.vmap(functools.partial(step, bandit), (None, 0, 0, 0))  # runs
  every = jax.vmap(every, (0, 0, None, None))  # bs

  def one(model, i):
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, i)))(batch["run"])
    model, good = every(tables, model, batch["rewards"], keys)
    model.first[...] = jnp.where((model.first[...] < 0) & good, done + i + 1, model.first[...])
    return model, None

  return jax.lax.scan(one, model, jnp.arange(bandit.updates, dtype=done.dtype))[0]


def _label(bandit: BanditConfig, log_policy, log_r, rewards, key):
  """(y, y2, whether y won)."""
  first_key, second_key, win_key = jax.random.split(key, 3)
  uniform = jnp.zeros_like(log_r)
  sampler = ALGORITHMS[bandit.algorithm][0]
  y = jax.random.categorical(first_key, uniform if sampler == "uniform" else log_policy)
  y2 = jax.random.categorical(second_key, {"policy": log_policy, "reference": log_r, "uniform": uniform}[sampler])
  return y, y2, jax.random.bernoulli(win_key, jax.nn.sigmoid(rewards[y] - rewards[y2]))


def _class_step(bandit: BanditConfig, tables, model: Learners, rewards: jax.Array, key: jax.Array):
  """One comparison, then the argmin over the class; a tie keeps the incumbent. Returns (model, whether it is good)."""
  b, log_r, log_class, d = tables
  incumbent = model.incumbent[...]
  y, y2, won = _label(bandit, log_class[incumbent], log_r, rewards, key)
  contrast = jnp.where(won, 1, -1) * b * (d[:, y] - d[:, y2])
  alpha = ALGORITHMS[bandit.algorithm][1] * bandit.alpha * b
  losses = model.losses[...] + alpha * log_class[:, y2] + jax.nn.softplus(-contrast)
  best = jnp.argmin(losses)
  incumbent = jnp.where(losses[best] < losses[incumbent] - 1e-9, best, incumbent).astype(incumbent.dtype)
  model.losses[...], model.incumbent[...] = losses, incumbent
  return model, shortfall(log_class[incumbent], log_r, rewards, b) < CLOSE


def _gradient_step(bandit: BanditConfig, tables, model: Learners, rewards: jax.Array, key: jax.Array):
  """One comparison, then gradient steps on the objective over all of them. Returns (model, whether it is good)."""
  b, log_r, *_ = tables
  log_policy = functools.partial(policy, bandit)
  y, y2, won = _label(bandit, log_policy(model.theta[...]), log_r, rewards, key)
  new = observed(log_r.shape[0], y[None], y2[None], won[None].astype(log_r.dtype))
  data = Comparisons(model.wins[...], model.second[...]) + new
  alpha = ALGORITHMS[bandit.algorithm][1] * bandit.alpha * b
  mean = lambda theta: xpo_objective(log_policy(theta), log_r, data, b, alpha) / data.count
  theta = model.theta[...]
  for _ in range(bandit.inner):
    theta = theta - bandit.rate / b**2 * jax.grad(mean)(theta)
  model.theta[...], model.wins[...], model.second[...] = theta, data.wins, data.second
  return model, shortfall(log_policy(theta), log_r, rewards, b) < CLOSE


def policy(bandit: BanditConfig, theta: jax.Array) -> jax.Array:
  """Log-probabilities of the responses from free logits."""
  return token_log_policy(theta) if bandit.policies == "tokens" else jax.nn.log_softmax(theta)


def shortfall(log_policy: jax.Array, log_r: jax.Array, rewards: jax.Array, b: jax.Array) -> jax.Array:
  """max J - J(policy) for J = E[reward] - b KL(policy || reference), which is b KL(policy || the best one)."""
  return b * games.kl(log_policy, games.best_response(rewards, log_r, b))


def _loss(bandit: BanditConfig, model: Learners, batch, key) -> dict[str, Mean]:
  """The mean shortfall of the policies of this moment; one that is not finite, or above 1, counts as 1."""
  del key
  like = batch["rewards"].dtype
  log_r, bs = jnp.asarray(bandit.log_references(), like)[:, None], jnp.asarray(bandit.bs, like)[:, None, None]
  if bandit.policies == "class":
    chosen = jax.nn.one_hot(model.incumbent[...], bandit.responses + 1, dtype=like)
    log_policy = jnp.einsum("brm,bmk->brk", chosen, jnp.asarray(bandit.log_class(), like))
  else:
    log_policy = jax.vmap(jax.vmap(functools.partial(policy, bandit)))(model.theta[...])
  gap = bs[..., 0] * games.kl(log_policy, games.best_response(batch["rewards"][None], log_r, bs))
  gap = jnp.minimum(jnp.nan_to_num(gap, nan=1.0), 1.0)
  return {"loss": Mean(jnp.sum(gap), jnp.asarray(gap.size, gap.dtype))}


def _summary(bandit: BanditConfig, model: Learners) -> dict[str, float]:
  """For each b: the share of runs that have had a good policy, and the median of the comparisons they took."""
  first = np.asarray(jax.jit(jax.reshard, static_argnums=1)(model.first[...], P(None, None)))
  taken = np.where(first < 0, np.inf, first)
  out = {f"succeeded@{b:g}": float((first[i] >= 0).mean()) for i, b in enumerate(bandit.bs)}
  return out | {f"comparisons@{b:g}": float(np.median(taken[i])) for i, b in enumerate(bandit.bs)}


def _spec(ndim: int) -> P:
  return P(None, BATCH, *[None] * (ndim - 2))
