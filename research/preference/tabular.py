"""Learning in a finite game, one softmax over its responses: every method is a row of `METHODS`.

A policy is the vector theta [n] of its logits. Every row moves it along a field F by theta + eta F(theta, opponent):
for uniform pairs (y, y') and an opponent's response y'', F = q - b d (centred), with q = P pi_opponent and
d = log pi - log r. That is a gradient step, of rate lr = eta b n / 4, on the squared loss
(1/n^2) sum_ij [(d_i - d_j) - (q_i - q_j) / b]^2, and with b taken inside it is defined for b = 0 too.
Rows whose field is another loss's gradient use that same rate, so that one eta means one learning rate.

Everything is a pure function of arrays for one game: vmap over games, keys, eta and b. Use float64
(`jax.enable_x64`) for gaps below 1e-6. Sources: EGPO, arXiv 2503.08942 and its public code (online IPO, Nash-MD,
Nash-MD-PG and EGPO); the other rows name theirs.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from research.errors import check
from research.preference import games, matrices
from research.preference.comparisons import Comparisons, empty, expected, observed, xpo_objective


@functools.partial(jax.tree_util.register_dataclass, data_fields=["preferences", "log_reference", "b"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Game:
  """preferences [n, n], P + P^T = 1; log_reference [n], normalised; b, weight of the KL terms, a scalar.

  Nothing is checked, as all three may be traced; `game` checks.
  """

  preferences: jax.Array
  log_reference: jax.Array
  b: Any

  def win_rates(self, theta: jax.Array) -> jax.Array:
    """q = P softmax(theta), [n]."""
    return games.win_rates(self.preferences, jax.nn.log_softmax(theta))

  def gap(self, theta: jax.Array) -> jax.Array:
    """The duality gap G_b of softmax(theta)."""
    log_policy = jax.nn.log_softmax(theta)
    return games.duality_gap(log_policy, self.log_reference, self.win_rates(theta), self.b)

  def original_gap(self, theta: jax.Array) -> jax.Array:
    """The duality gap G_0 of softmax(theta) in the game without KL terms."""
    return games.original_gap(self.win_rates(theta))


def game(preferences: np.ndarray, reference: np.ndarray, b: float) -> Game:
  """The game of a matrix [n, n] and a reference's probabilities [n].

  Raises UserError naming the entry that is no probability, breaks P + P^T = 1 or leaves a response without mass.
  """
  p, log_r = matrices.checked(preferences), matrices.checked_policy(reference)
  check(p.shape == (*log_r.shape, *log_r.shape), "reference", f"shape {log_r.shape}", f"preferences are {p.shape}")
  check(b >= 0, "b", b, "must not be negative")
  return Game(jnp.asarray(p), jnp.asarray(log_r), b)


@dataclasses.dataclass(frozen=True)
class Sampled:
  """How a field is estimated: the mean over `samples` independent draws; with `hard`, P is a coin's side, not a number.

  None in its place stands for the expectation.
  """

  samples: int
  hard: bool = False

  def policy(self, key: jax.Array, log_policy: jax.Array) -> jax.Array:
    """Responses [samples]."""
    return jax.random.categorical(key, log_policy, shape=(self.samples,))

  def wins(self, key: jax.Array, p: jax.Array) -> jax.Array:
    """Of preference probabilities: themselves, or 1 with that probability and else 0."""
    return jax.random.bernoulli(key, p).astype(p.dtype) if self.hard else p


# A field: (game, theta, theta of the opponent, key, Sampled or None) -> direction [n]. The key is unused when exact.
Field = Callable[[Game, jax.Array, jax.Array, jax.Array, Sampled | None], jax.Array]


def uniform_pairs(game: Game, theta, opponent, key, sampled: Sampled | None):
  """y, y' uniform, y'' of the opponent: online IPO, first form (OMD), and all that is mirror descent."""
  d = _log_ratio(game, theta)
  if sampled is None:
    return _centred(game.win_rates(opponent) - game.b * d)
  n = theta.shape[-1]
  pairs_key, opponent_key, first_key, second_key = jax.random.split(key, 4)
  y, y2 = jax.random.randint(pairs_key, (2, sampled.samples), 0, n)
  y3 = sampled.policy(opponent_key, jax.nn.log_softmax(opponent))
  first = sampled.wins(first_key, game.preferences[y, y3])
  second = sampled.wins(second_key, game.preferences[y2, y3])
  return n / 2 * _contrast(n, y, y2, first - second - game.b * (d[y] - d[y2]))


def policy_pairs(game: Game, theta, opponent, key, sampled: Sampled | None):
  """y of the policy, y' of the opponent: online IPO, second form (arXiv 2403.08635).

  Its target is (P(y, y') - 1/2) / b, and sampling has no gradient. The first gradient step of
  INPO's loss (arXiv 2407.00617) goes the same way.
  """
  d = _log_ratio(game, theta)
  log_policy, log_opponent = jax.nn.log_softmax(theta), jax.nn.log_softmax(opponent)
  n = theta.shape[-1]
  if sampled is None:
    errors = game.preferences - 0.5 - game.b * (d[:, None] - d[None, :])
    weights = jnp.exp(log_policy[:, None] + log_opponent[None, :])
    return n / 2 * _moved(weights * errors)
  first_key, second_key, win_key = jax.random.split(key, 3)
  y, y2 = sampled.policy(first_key, log_policy), sampled.policy(second_key, log_opponent)
  wins = sampled.wins(win_key, game.preferences[y, y2])
  return n / 2 * _contrast(n, y, y2, wins - 0.5 - game.b * (d[y] - d[y2]))


def policy_gradient(game: Game, theta, opponent, key, sampled: Sampled | None):
  """REINFORCE of P(y, y'') - 1/2 - b d(y), y of the policy and y'' of the opponent: Nash-MD-PG (arXiv 2312.00886)."""
  d = _log_ratio(game, theta)
  log_policy = jax.nn.log_softmax(theta)
  n = theta.shape[-1]
  if sampled is None:
    rewards = game.win_rates(opponent) - 0.5 - game.b * d
    pi = jnp.exp(log_policy)
    return game.b * n / 4 * pi * (rewards - jnp.sum(pi * rewards))
  first_key, second_key, win_key = jax.random.split(key, 3)
  y, y2 = sampled.policy(first_key, log_policy), sampled.policy(second_key, jax.nn.log_softmax(opponent))
  rewards = sampled.wins(win_key, game.preferences[y, y2]) - 0.5 - game.b * d[y]
  scores = jax.nn.one_hot(y, n, dtype=theta.dtype) - jnp.exp(log_policy)
  return game.b * n / 4 * jnp.mean(rewards[:, None] * scores, axis=0)


def logistic_pairs(game: Game, theta, opponent, key, sampled: Sampled | None):
  """y of the policy, y' of the opponent, DPO's loss on the pair (arXiv 2305.18290): online DPO.

  Its minimiser assumes Bradley-Terry preferences; in an intransitive game it is not the equilibrium.
  """
  d = _log_ratio(game, theta)
  log_policy, log_opponent = jax.nn.log_softmax(theta), jax.nn.log_softmax(opponent)
  n = theta.shape[-1]
  if sampled is None:
    errors = game.preferences - jax.nn.sigmoid(game.b * (d[:, None] - d[None, :]))
    weights = jnp.exp(log_policy[:, None] + log_opponent[None, :])
    return game.b**2 * n / 4 * _moved(weights * errors)
  first_key, second_key, win_key = jax.random.split(key, 3)
  y, y2 = sampled.policy(first_key, log_policy), sampled.policy(second_key, log_opponent)
  errors = sampled.wins(win_key, game.preferences[y, y2]) - jax.nn.sigmoid(game.b * (d[y] - d[y2]))
  return game.b**2 * n / 4 * _contrast(n, y, y2, errors)


# An opponent: (game, theta, eta) -> its theta.


def itself(game: Game, theta: jax.Array, eta: jax.Array) -> jax.Array:
  """The policy of this moment."""
  del game, eta
  return theta


def reference(game: Game, theta: jax.Array, eta: jax.Array) -> jax.Array:
  """The reference policy: the second response of XPO's algorithm (arXiv 2405.21046)."""
  del theta, eta
  return game.log_reference


def mixture(game: Game, theta: jax.Array, eta: jax.Array, strength: float = 1.0) -> jax.Array:
  """The geometric mixture of weights (1 - c, c) of policy and reference, c = strength eta b: Nash-MD's opponent.

  EGPO's public code has half the strength that its own effective step implies: `strength` 1/2 gives its figures.
  """
  c = strength * eta * game.b
  return (1 - c) * theta + c * game.log_reference


@functools.partial(jax.tree_util.register_dataclass, data_fields=["theta", "anchor", "data", "step"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class State:
  """What an update changes.

  theta [n]: the policy, whose gap is measured. anchor [n]: what optimism starts from, a magnet, or APO's last step.
  data: the comparisons so far, where an update keeps them. step: updates made, int32.
  """

  theta: jax.Array
  anchor: jax.Array
  data: Comparisons
  step: jax.Array


def start(theta: jax.Array) -> State:
  """The state from which every update begins; the usual policy is the reference's, `game.log_reference`."""
  return State(theta, theta, empty(theta.shape[-1], theta.dtype), jnp.zeros((), jnp.int32))


# An update: (method, game, state, eta, key, Sampled or None) -> State.


def plain(method, game: Game, state: State, eta, key, sampled) -> State:
  """theta + eta F(theta, opponent)."""
  theta = state.theta
  theta = theta + eta * method.field(game, theta, method.opponent(game, theta, eta), key, sampled)
  return dataclasses.replace(state, theta=_centred(theta), step=state.step + 1)


def extragradient(method, game: Game, state: State, eta, key, sampled) -> State:
  """A half step to an opponent that looks ahead, then the whole step from theta against it: two fields an update.

  EGPO, arXiv 2503.08942: the contrast is theta's in both; only the opponent is the half step's.
  """
  theta = state.theta
  half_key, key = jax.random.split(key)
  half = theta + eta * method.field(game, theta, method.opponent(game, theta, eta), half_key, sampled)
  theta = theta + eta * method.field(game, theta, method.opponent(game, half, eta), key, sampled)
  return dataclasses.replace(state, theta=_centred(theta), step=state.step + 1)


def optimistic(method, game: Game, state: State, eta, key, sampled) -> State:
  """One field an update: the next policy is a step ahead of the anchor along the field last seen.

  anchor' = anchor + eta (q - b d(anchor)), theta' = anchor' + eta (q - b d(anchor')), q the win rates against theta:
  optimistic mirror descent (Popov, 1980; ONPO, arXiv 2502.16852, is b = 0). For fields that are linear in d.
  """
  anchor = state.anchor
  seen = method.field(game, anchor, method.opponent(game, state.theta, eta), key, sampled)
  moved = _centred(anchor + eta * seen)
  # the same q, with d at the moved anchor
  ahead = moved + eta * (seen - game.b * _centred(moved - anchor))
  return dataclasses.replace(state, theta=_centred(ahead), anchor=moved, step=state.step + 1)


def magnetic(method, game: Game, state: State, eta, key, sampled, period: int = 0) -> State:
  """Mirror descent whose KL term pulls to a magnet (the anchor), taken at the new policy:

  pi' proportional to [pi magnet^(eta b) exp(eta q)]^(1 / (1 + eta b)) (MMD; magnetic PO, arXiv 2410.16714).
  Every `period` updates the magnet becomes the policy, and the limit is the original game's equilibrium; with
  period 0 it stays where it began.
  """
  pulled = dataclasses.replace(game, log_reference=jax.nn.log_softmax(state.anchor))
  theta = state.theta
  step = eta / (1 + eta * game.b)
  theta = theta + step * method.field(pulled, theta, method.opponent(pulled, theta, eta), key, sampled)
  theta, count = _centred(theta), state.step + 1
  anchor = jnp.where(count % period == 0, theta, state.anchor) if period else state.anchor
  return dataclasses.replace(state, theta=theta, anchor=anchor, step=count)


def accelerated(method, game: Game, state: State, eta, key, sampled, coefficient: float = 0.3) -> State:
  """Momentum over policies: theta' = hat' + a (hat' - hat), hat' = theta + eta F(theta, opponent), hat the anchor.

  Accelerated PO (arXiv 2410.06293; not the anchored one): log-policies are extrapolated, not parameters' steps.
  """
  theta = state.theta
  hat = _centred(theta + eta * method.field(game, theta, method.opponent(game, theta, eta), key, sampled))
  theta = hat + coefficient * (hat - _centred(state.anchor))
  return dataclasses.replace(state, theta=_centred(theta), anchor=hat, step=state.step + 1)


def accumulated(method, game: Game, state: State, eta, key, sampled, alpha: float = 0.0) -> State:
  """New comparisons of the policy with the opponent join all those before, then one gradient step on the whole.

  XPO's objective (`comparisons.xpo_objective`, a mean over the data; alpha 0: DPO's), with a gradient step
  where the algorithm has an argmin: its theorem says nothing of this.
  """
  theta, log_policy = state.theta, jax.nn.log_softmax(state.theta)
  n = theta.shape[-1]
  log_opponent = jax.nn.log_softmax(method.opponent(game, theta, eta))
  if sampled is None:
    data = state.data + expected(game.preferences, log_policy, log_opponent)
  else:
    first_key, second_key, win_key = jax.random.split(key, 3)
    y, y2 = sampled.policy(first_key, log_policy), sampled.policy(second_key, log_opponent)
    data = state.data + observed(n, y, y2, sampled.wins(win_key, game.preferences[y, y2]))

  def objective(theta):
    return xpo_objective(jax.nn.log_softmax(theta), game.log_reference, data, game.b, alpha) / data.count

  theta = theta - eta * game.b * n / 4 * jax.grad(objective)(theta)
  return dataclasses.replace(state, theta=_centred(theta), data=data, step=state.step + 1)


@dataclasses.dataclass(frozen=True)
class Method:
  """A row: which field, against whom, by which update.

  original: of the game without KL terms; its update sees b = 0.
  queries: preferences asked per sample and update.
  """

  field: Field = uniform_pairs  # `accumulated` has its own
  opponent: Callable[[Game, jax.Array, jax.Array], jax.Array] = itself
  update: Callable[..., State] = plain
  original: bool = False
  queries: int = 2

  def __call__(
    self, game: Game, state: State, eta: Any, key: jax.Array | None = None, sampled: Sampled | None = None
  ) -> State:
    """The next state. eta: a number, or a function of the count of updates made; key: needed when sampled."""
    eta = eta(state.step) if callable(eta) else eta
    key = jax.random.key(0) if key is None else key
    if self.original:
      game = dataclasses.replace(game, b=jnp.zeros_like(game.b))
    return self.update(self, game, state, eta, key, sampled)


METHODS: dict[str, Method] = {
  "online_ipo_uniform": Method(),
  "online_ipo_policy": Method(policy_pairs, queries=1),
  "nash_md": Method(opponent=mixture),
  "nash_md_pg": Method(policy_gradient, mixture, queries=1),
  "egpo": Method(update=extragradient, queries=4),
  "optimistic": Method(update=optimistic),
  # The minimiser of INPO's loss is pi' ~ exp(eta q) r^(eta b) pi^(1 - eta b), with eta = 1 / eta_INPO and b = tau:
  # step by step it is online IPO against uniform pairs.
  "inpo": Method(),
  # log pi' = log pi + eta q: self-play multiplicative weights (SPPO, arXiv 2405.00675; SPO, arXiv 2401.04056).
  "sppo": Method(original=True),
  "onpo": Method(update=optimistic, original=True),
  "apo": Method(update=accelerated, original=True),
  "mmd": Method(update=magnetic),
  "mpo": Method(update=functools.partial(magnetic, period=100)),
  "online_dpo": Method(logistic_pairs, queries=1),
  "online_dpo_reference": Method(logistic_pairs, reference, queries=1),
  "xpo": Method(opponent=reference, update=functools.partial(accumulated, alpha=1e-3), queries=1),
}


def run(
  method: Method,
  game: Game,
  state: State,
  eta: Any,
  steps: int,
  measure: Callable[[State], Any],
  *,
  every: int = 1,
  key: jax.Array | None = None,
  sampled: Sampled | None = None,
) -> tuple[State, Any]:
  """(the state after `steps` updates, what `measure` gives of the states after 0, every, 2 every, ... steps, stacked).

  steps must divide by every. One compiled loop: traceable, and vmapped over what `game`, `eta` and `key` hold.
  """
  key = jax.random.key(0) if key is None else key

  def one(state, _):
    return method(game, state, eta, jax.random.fold_in(key, state.step), sampled), None

  def measured(state, _):
    now = measure(state)
    return jax.lax.scan(one, state, length=every)[0], now

  last, seen = jax.lax.scan(measured, state, length=steps // every)
  return last, jax.tree.map(lambda xs, x: jnp.append(xs, x[None], axis=0), seen, measure(last))


def _log_ratio(game: Game, theta: jax.Array) -> jax.Array:
  return jax.nn.log_softmax(theta) - game.log_reference


def _centred(x: jax.Array) -> jax.Array:
  return x - jnp.mean(x)


def _moved(weights: jax.Array) -> jax.Array:
  """sum_ij weights_ij (e_i - e_j)."""
  return jnp.sum(weights, axis=1) - jnp.sum(weights, axis=0)


def _contrast(n: int, y: jax.Array, y2: jax.Array, x: jax.Array) -> jax.Array:
  """The mean over samples of x (e_y - e_y2)."""
  return jnp.zeros(n, x.dtype).at[y].add(x).at[y2].add(-x) / x.shape[0]
