"""The gap between online and offline preference learning, on strings few enough to enumerate.

After Tang et al., "Understanding the performance gap between online and offline alignment algorithms" (arXiv
2405.08448): one loss (IPO's), one data set of comparisons that the golden preference labelled, and a proxy fitted to
that data set, which is all that online learning asks. Told are the golden win rate against the reference and the KL
paid for it. Golden and proxy are different functions: the golden one goes in circles and has parts that no policy
here can express, the proxy is a score a string. Expectations over the policy are exact; recorded labels are drawn once.
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

from experiments.prefgames.strings import all_strings, log_policy, start
from research.config import RunConfig
from research.data import same_batch
from research.errors import check
from research.fit import Experiment, TrainState
from research.mesh import BATCH, batch_shard, row_spec
from research.metrics import Mean
from research.preference import games, matrices

STACK = P(BATCH, None, None, None)  # [worlds, taus, a policy's two axes]
# Whose pairs, and who labels them. "shuffled": what the online run showed at any time, all at once.
DATA = {
  "online": ("policy", "proxy"),
  "online_golden": ("policy", "golden"),
  "offline": ("recorded", "golden"),
  "offline_proxy": ("recorded", "proxy"),
  "shuffled": ("shown", "proxy"),
}


@dataclasses.dataclass(frozen=True)
class StringsConfig:
  """Which strings, from whose pairs, and how fast. A run has a policy a world and tau."""

  vocab: int = 4
  length: int = 3
  width: int = 4
  data: Literal[*DATA] = "online"
  pairs: int = 300  # recorded comparisons, of the reference with itself
  taus: tuple[float, ...] = (0.1, 0.03, 0.01)  # IPO's weight of the KL term
  rate: float = 0.5  # the learning rate over tau
  updates: int = 20  # in one step of the loop

  def __post_init__(self):
    check(self.vocab >= 2, "vocab", self.vocab, "use at least 2")
    check(self.length >= 1 and self.vocab**self.length <= 512, "length", self.length, "at most 512 strings in all")
    check(len(self.taus) > 0 and min(self.taus) > 0, "taus", self.taus, "give positive weights of the KL term")
    check(self.rate > 0, "rate", self.rate, "must be positive")
    for name in ("pairs", "updates"):
      check(getattr(self, name) >= 1, name, getattr(self, name), "use a whole number of at least 1")


class Policies(nnx.Module):
  """theta [worlds, taus, ...]."""

  def __init__(self, reference: np.ndarray, taus: int):
    start = np.repeat(reference[:, None], taus, axis=1)
    self.theta = nnx.Param(jax.reshard(jnp.asarray(start), STACK))


def references(seed: int, count: int, vocab: int, width: int) -> np.ndarray:
  """The policies [count, ...] that every run of a seed starts from."""
  return start(np.random.default_rng((11, seed)), count, vocab, width)


@functools.lru_cache(maxsize=8)
def worlds(seed: int, count: int, vocab: int, length: int, width: int, pairs: int) -> dict[str, np.ndarray]:
  """`count` rows: reference, a policy; golden, proxy [n, n]; recorded [n, n], the share of comparisons that i won of j.

  A golden log-odds is the difference of a score that a policy can express, less one that none can, plus a skew matrix
  that no score can, in the ratio 2 : 1 : 1 of standard deviations.
  """
  rng = np.random.default_rng((12, seed))
  strings = all_strings(vocab, length)
  n, of = len(strings), jax.jit(jax.vmap(log_policy, (0, None)))
  reference, expressed = references(seed, count, vocab, width), start(rng, count, vocab, width)
  log_r = np.asarray(of(reference, strings), np.float64)
  score = _unit(np.asarray(of(expressed, strings), np.float64)) + 0.5 * rng.normal(size=(count, n))
  skew = np.tril(rng.normal(size=(count, n, n)), -1)
  golden = _sigmoid(score[:, :, None] - score[:, None, :] + 0.5 * (skew - np.swapaxes(skew, 1, 2)))
  recorded = np.zeros((count, n, n))
  for world in range(count):
    y, y2 = rng.choice(n, size=(2, pairs), p=np.exp(log_r[world]))
    won = rng.random(pairs) < golden[world, y, y2]
    np.add.at(recorded[world], (np.where(won, y, y2), np.where(won, y2, y)), 1 / pairs)
  proxy = np.stack([matrices.bradley_terry(fitted_scores(w * pairs)) for w in recorded])
  return {"reference": reference, "golden": golden, "proxy": proxy, "recorded": recorded}


def fitted_scores(wins: np.ndarray, ridge: float = 0.3) -> np.ndarray:
  """Bradley-Terry scores [n] of most likely wins [n, n], by Newton's method; a string never seen has 0."""
  n = len(wins)
  s, count = np.zeros(n), wins + wins.T
  for _ in range(30):
    p = matrices.bradley_terry(s)
    weight = count * p * (1 - p)
    hessian = np.diag(weight.sum(1) + ridge) - weight
    s = s + np.linalg.solve(hessian, (wins - count * p).sum(1) - ridge * s)
  return s


def make(cfg: RunConfig, strings: StringsConfig) -> Experiment:
  """`cfg.batch` worlds, and a policy for each tau of each."""
  check(cfg.accumulate == 1, "accumulate", cfg.accumulate, "worlds are not split into micro-batches; use 1")
  n, like = strings.vocab**strings.length, jax.dtypes.canonicalize_dtype(np.float64)
  drawn = functools.partial(worlds, cfg.seed, cfg.batch, strings.vocab, strings.length, strings.width, strings.pairs)

  def data(split):
    rows = learnt_from(strings, drawn(), cfg.steps * strings.updates)
    return same_batch(rows, shard=batch_shard(jax.sharding.get_mesh()), train=split == "train")

  def batch():
    shapes = {"reference": (2 * strings.vocab + 1, strings.width), "golden": (n, n), "labels": (n, n)}
    shapes["weights"] = (len(strings.taus), n, n)
    return {name: jax.ShapeDtypeStruct((cfg.batch, *shape), like) for name, shape in shapes.items()}

  return Experiment(
    init=lambda key: Policies(references(cfg.seed, cfg.batch, strings.vocab, strings.width), len(strings.taus)),
    loss=functools.partial(_loss, strings),
    data=data,
    batch=batch,
    tx=optax.identity(),
    evals={"golden": functools.partial(_summary, strings, drawn)},
    flops_per_token={"pairs": 8.0 * len(strings.taus) * strings.updates * n},
    info=lambda: {"source": "strings", "worlds": cfg.batch, "strings": n},
    train_step=functools.partial(_train_step, strings),
  )


def learnt_from(strings: StringsConfig, rows: dict[str, np.ndarray], updates: int) -> dict[str, np.ndarray]:
  """reference and golden; labels [worlds, n, n], probabilities; weights of pairs [worlds, taus, n, n].

  Policies that write their own pairs have no use for the weights.
  """
  pairs, labeller = DATA[strings.data]
  count = rows["recorded"] + np.swapaxes(rows["recorded"], 1, 2)
  labels = rows["proxy"] if labeller == "proxy" else rows["golden"]
  if strings.data == "offline":  # each label was drawn once
    labels = np.divide(rows["recorded"], count, out=np.full_like(count, 0.5), where=count > 0)
  weights = np.repeat(count[:, None] / 2, len(strings.taus), axis=1)
  if pairs == "shown":
    weights = shown(strings, rows["reference"], labels, updates)
  return {"reference": rows["reference"], "golden": rows["golden"], "labels": labels, "weights": weights}


def shown(strings: StringsConfig, reference: np.ndarray, labels: np.ndarray, updates: int) -> np.ndarray:
  """[worlds, taus, n, n]: how often each pair came up in a whole online run with these labels, as shares."""
  online = dataclasses.replace(strings, data="online")
  weights = np.zeros((len(reference), len(strings.taus), 1, 1))

  @jax.jit
  def total(theta, *row):
    def one(moved, _):
      theta, seen = moved
      log_pi = jax.vmap(jax.vmap(functools.partial(log_policy, strings=_all(strings))))(theta)
      return (_updated(online, theta, *row), seen + _pairs(log_pi)), None

    empty = jnp.zeros((*theta.shape[:2], *row[1].shape[1:]), theta.dtype)
    return jax.lax.scan(one, (theta, empty), length=updates)[0][1] / updates

  theta = np.repeat(reference[:, None], len(strings.taus), axis=1)
  return np.asarray(total(theta, reference, labels, weights))


def _all(strings: StringsConfig) -> np.ndarray:
  return all_strings(strings.vocab, strings.length)


def _pairs(log_policy: jax.Array) -> jax.Array:
  """The probabilities [..., n, n] of both responses of a pair."""
  pi = jnp.exp(log_policy)
  return pi[..., :, None] * pi[..., None, :]


def _updated(strings: StringsConfig, theta, reference, labels, weights) -> jax.Array:
  """theta [worlds, taus, ...] after an update of each."""
  one = jax.vmap(functools.partial(update, strings), (0, 0, None, None, 0))
  return jax.vmap(one, (None, 0, 0, 0, 0))(jnp.asarray(strings.taus, theta.dtype), theta, reference, labels, weights)


def update(strings: StringsConfig, tau, theta, reference, labels, weights) -> jax.Array:
  """theta of one policy after a gradient step of rate tau / 2 on IPO's loss, sum of w_ij (h_ij - (p_ij - 1/2) / tau)^2.

  labels p, weights w: [n, n]. Of a policy that writes its own pairs w is theirs, which gets no gradient.
  """
  of = functools.partial(log_policy, strings=_all(strings))
  log_pi, pull = jax.vjp(of, theta)
  d = log_pi - of(reference)
  w = _pairs(log_pi) if DATA[strings.data][0] == "policy" else weights
  errors = w * (labels - 0.5 - tau * (d[:, None] - d[None, :]))
  return theta + strings.rate * pull(jnp.sum(errors, axis=1) - jnp.sum(errors, axis=0))[0]


def _train_step(strings: StringsConfig, exp: Experiment, cfg: RunConfig, state: TrainState, batch, reference=None):
  """`strings.updates` updates of every policy. Returns (state, metrics)."""
  del exp, cfg, reference
  names = ("reference", "labels", "weights")
  specs = [row_spec(batch[name].ndim) for name in names]

  def run(theta, *rows):
    return jax.lax.scan(lambda x, _: (_updated(strings, x, *rows), None), theta, length=strings.updates)[0]

  before = state.model.theta[...]
  run = jax.shard_map(run, in_specs=(STACK, *specs), out_specs=STACK, check_vma=False)
  theta = run(before, *(batch[name] for name in names))
  model = jax.tree.map(lambda _: theta, state.model)
  size = jnp.sqrt(jnp.sum((theta - before) ** 2))
  metrics = {"loss": _loss(strings, model, batch, None)["loss"].value}
  return TrainState(state.step + 1, model, state.opt, state.key), metrics | {
    "update_norm": size,
    "grad_norm": size / strings.updates,
  }


def _measures(strings: StringsConfig, theta: jax.Array, rows) -> dict[str, jax.Array]:
  """[worlds, taus] each: golden win rate against the reference, KL to it, and golden labels classified right."""
  of = jax.vmap(functools.partial(log_policy, strings=_all(strings)))
  log_pi, log_r = jax.vmap(of)(theta), of(rows["reference"])[:, None]
  q = games.win_rates(rows["golden"][:, None], log_r)
  found = {"win_rate": jnp.sum(jnp.exp(log_pi) * q, axis=-1), "kl": games.kl(log_pi, log_r)}
  if "recorded" in rows:
    d = log_pi - log_r
    right = jnp.sign(d[..., :, None] - d[..., None, :]) / 2 + 0.5  # a draw is half right
    found["classified"] = jnp.einsum("wij,wtij->wt", rows["recorded"], right)
  return found


def _loss(strings: StringsConfig, model: Policies, batch, key) -> dict[str, Mean]:
  """How often the reference wins, by the golden preference; one that is not finite counts as 1."""
  del key
  lost = 1 - _measures(strings, model.theta[...], batch)["win_rate"]
  lost = jnp.nan_to_num(lost, nan=1.0)
  return {"loss": Mean(jnp.sum(lost), jnp.asarray(lost.size, lost.dtype))}


def _summary(strings: StringsConfig, drawn, model: Policies) -> dict[str, float]:
  """Means over worlds, for each tau."""
  theta = np.asarray(jax.jit(jax.reshard, static_argnums=1)(model.theta[...], P(None, None, None, None)))
  rows = drawn()
  found = {name: np.asarray(x).mean(0) for name, x in _compiled(strings)(theta, rows).items()}
  return {f"{name}@{tau:g}": float(x[i]) for name, x in found.items() for i, tau in enumerate(strings.taus)}


@functools.lru_cache(maxsize=8)
def _compiled(strings: StringsConfig):
  return jax.jit(functools.partial(_measures, strings))


def _unit(x: np.ndarray) -> np.ndarray:
  return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-x))
