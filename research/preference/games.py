"""The game that preferences define: value, best response, duality gap and equilibrium.

Notation: n responses; P[i, j] the probability that i beats j; r the reference policy; b the weight of the KL
terms; q = P pi the win rates against a policy. Two players choose p1 and p2, and the first wants

  V_b(p1, p2) = p1' P p2 - b KL(p1 || r) + b KL(p2 || r)

(Nash-MD, arXiv 2312.00886; EGPO, arXiv 2503.08942). It is symmetric and has one equilibrium,
log pi* = log r + P pi* / b + const, of value 1/2. Policies are log-probabilities [..., n]; the functions of
arrays follow their dtype, stack along leading axes and run under jit and vmap. A gap is a difference of numbers of
order 1: take float64 (`jax.enable_x64`) where one below 1e-6 matters.
"""

import jax
from jax import numpy as jnp
from jax.scipy.special import logsumexp
import numpy as np
import scipy.optimize

from research.errors import check
from research.preference import matrices

RESIDUAL = 1e-10  # of an equilibrium's equation


def win_rates(preferences: jax.Array, log_policy: jax.Array) -> jax.Array:
  """q = P pi: how often each response beats one drawn from the policy, [..., n]."""
  return jnp.einsum("...ij,...j->...i", preferences, jnp.exp(log_policy))


def kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """KL(p || q) in nats, [...]; 0 log 0 is 0, so that p may leave responses out, as `nash` does."""
  p = jnp.exp(log_p)
  return jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0), axis=-1)


def value(
  preferences: jax.Array, log_first: jax.Array, log_second: jax.Array, log_reference: jax.Array, b: float
) -> jax.Array:
  """V_b(first, second), [...]."""
  wins = jnp.sum(jnp.exp(log_first) * win_rates(preferences, log_second), axis=-1)
  return wins - b * kl(log_first, log_reference) + b * kl(log_second, log_reference)


def best_response(q: jax.Array, log_reference: jax.Array, b: float) -> jax.Array:
  """The policy proportional to r exp(q / b): either player's best answer to an opponent with win rates q."""
  return jax.nn.log_softmax(log_reference + q / b, axis=-1)


def duality_gap(log_policy: jax.Array, log_reference: jax.Array, q: jax.Array, b: float) -> jax.Array:
  """G_b(pi) = max_p V_b(p, pi) - min_p V_b(pi, p) for q = P pi, [...]; 0 at the equilibrium only.

  In closed form 2 b log sum_y r(y) exp(q(y) / b) + 2 b KL(pi || r) - 1, without an inner solver and
  without P: win rates are enough, so that a large set of responses needs no matrix.
  """
  return 2 * b * logsumexp(log_reference + q / b, axis=-1) + 2 * b * kl(log_policy, log_reference) - 1


def original_gap(q: jax.Array) -> jax.Array:
  """G_0(pi) = 2 (max_y q(y) - 1/2) for q = P pi: the duality gap without KL terms, [...]."""
  return 2 * jnp.max(q, axis=-1) - 1


def bias_bound(log_reference: jax.Array, b: float) -> jax.Array:
  """2 b max_y log(1 / r(y)), [...]: no more than this is the original gap of the regularised equilibrium.

  From the equilibrium's inequality V_b(e_y, pi*) <= 1/2, where KL(e_y || r) = log(1 / r(y)).
  """
  return 2 * b * jnp.max(-log_reference, axis=-1)


def equilibrium(preferences: np.ndarray, log_reference: np.ndarray, b: float) -> np.ndarray:
  """log pi* [..., n] in float64 of each game: P [..., n, n], log r [..., n], stacked alike.

  Newton's method on z = log r + P softmax(z) / b, followed from a large b down to the one asked for. The path has
  no turning point: at a singular Jacobian some v has b v = S D v with S = P - 1/2 skew and D the covariance of
  softmax, whence v' D v = 0 and v = 0. Raises UserError for a bad game; ArithmeticError where the equation is
  left with more than `RESIDUAL`.
  """
  p = matrices.checked(preferences)
  log_r = matrices.checked_policy(np.exp(np.asarray(log_reference, np.float64)))
  check(b > 0, "b", b, "must be positive; without KL terms use `nash`")
  shape = log_r.shape
  stacked = zip(p.reshape(-1, *p.shape[-2:]), log_r.reshape(-1, shape[-1]), strict=True)
  solved = [_follow(*game, b) for game in stacked]
  return np.stack(solved).reshape(shape)


def _follow(p: np.ndarray, log_r: np.ndarray, b: float) -> np.ndarray:
  s = p - 0.5  # the constant half shifts z, no more
  z, at, factor = log_r - log_r.mean(), max(1.0, b), 0.7
  z, _ = _newton(s, log_r, z, at)
  while at > b:
    to = max(b, at * factor)
    # along the path z - log r grows like 1 / b
    guess, error = _newton(s, log_r, log_r + (z - log_r) * at / to, to)
    if error < 1e-8:
      z, at, factor = guess, to, max(0.5, factor**1.5)
    else:
      factor = factor**0.5
      if factor > 0.9999:
        break
  z, error = _newton(s, log_r, z, b)
  if not error < RESIDUAL:
    raise ArithmeticError(f"no equilibrium found at b={b}: residual {error:.1e}")
  return z - np.logaddexp.reduce(z)


def _newton(s: np.ndarray, log_r: np.ndarray, z: np.ndarray, b: float) -> tuple[np.ndarray, float]:
  """(z, its largest residual) after Newton steps, halved where the residual would grow."""

  def equation(z):
    pi = np.exp(z - np.logaddexp.reduce(z))
    return z - log_r - s @ pi / b, pi

  f, pi = equation(z)
  for _ in range(50):
    step = np.linalg.solve(np.eye(len(z)) - s @ (np.diag(pi) - np.outer(pi, pi)) / b, f)
    scale, error = 1.0, np.abs(f).max()
    while scale > 1e-6:
      f_new, pi_new = equation(z - scale * step)
      if np.abs(f_new).max() < error:
        break
      scale /= 2
    else:
      break  # at the floor of rounding
    z, f, pi = z - scale * step, f_new, pi_new
  return z, np.abs(f).max()


def nash(preferences: np.ndarray) -> np.ndarray:
  """An equilibrium [n] (probabilities, float64) of the game without KL terms: max v with P' p >= v.

  Linear programming (scipy's HiGHS). Raises UserError.
  """
  p = matrices.checked(preferences)
  n = p.shape[-1]
  solution = scipy.optimize.linprog(
    c=np.append(np.zeros(n), -1.0),
    A_ub=np.hstack([-p.T, np.ones((n, 1))]),
    b_ub=np.zeros(n),
    A_eq=np.append(np.ones(n), 0.0)[None],
    b_eq=[1.0],
    bounds=[(0, None)] * n + [(None, None)],
    method="highs",
  )
  if not solution.success:
    raise ArithmeticError(f"the linear program failed: {solution.message}")
  return solution.x[:n]
