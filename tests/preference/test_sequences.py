"""Samplers and methods on a model of the zoo: drawn frequencies, one program, and the same on every mesh."""

import functools
import itertools

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from research.errors import UserError
from research.generation import Sampling
from research.mesh import MeshConfig
from research.metrics import Mean
from research.models.transformer import Transformer
from research.preference import methods, oracles, updates
from research.preference.online import OnlineConfig, gradient
from research.preference.samplers import GeometricMixture, Policy, Reference, Responses, Uniform, draw, token_log_probs
from tests import small

VOCAB, LENGTH = 4, 2
TINY = small.varied(vocab=VOCAB, width=16, layers=1, heads=2, kv_heads=1, mlp_width=16)
STRINGS = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)), np.int32)


def model(seed):
  """Far from uniform: a fresh model is nearly so."""
  m = Transformer(jax.random.key(seed), TINY)
  return jax.tree.map(lambda x: 3 * x, m)


def prompts(rows):
  return {"prompts": jnp.tile(jnp.array([[0, 2, 1]], jnp.int32), (rows, 1)), "lengths": jnp.full(rows, 2, jnp.int32)}


@functools.cache
def laws():
  """log pi and log r of all strings after the prompt, token by token: [strings, LENGTH] each."""
  n = len(STRINGS)
  of = jax.jit(
    lambda m: token_log_probs(m, *prompts(n).values(), Responses(jnp.asarray(STRINGS), jnp.ones((n, LENGTH))))
  )
  with small.use():
    return [np.asarray(of(model(seed)), np.float64) for seed in (0, 1)]


def tokenwise(mix):
  """log-probs [strings] of a law made token by token by `mix` of the two models' next-token log-probs."""
  policy, reference = (x.reshape(VOCAB, VOCAB, LENGTH) for x in laws())
  first = mix(policy[:, 0, 0], reference[:, 0, 0])
  second = mix(policy[:, :, 1], reference[:, :, 1])
  return (np.asarray(jax.nn.log_softmax(first))[:, None] + np.asarray(jax.nn.log_softmax(second))).reshape(-1)


def test_token_log_probs_are_those_of_the_logits_and_padding_is_nothing():
  policy, _ = laws()
  np.testing.assert_allclose(np.exp(policy.sum(1)).sum(), 1, atol=1e-5)
  with small.use():
    row = np.concatenate([np.tile([[2, 1]], (16, 1)), STRINGS], axis=1).astype(np.int32)
    logits = model(0).logits(row, np.ones_like(row), np.tile(np.arange(4, dtype=np.int32), (16, 1)))
  said = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits))[:, 1:3], STRINGS[..., None], -1)[..., 0]
  np.testing.assert_allclose(policy, said, atol=1e-5)


C = 0.6
SAMPLERS = {
  "uniform": (Uniform(), lambda p, r: np.zeros_like(p)),
  "policy": (Policy(), lambda p, r: p),
  "reference": (Reference(), lambda p, r: r),
  "mixture": (GeometricMixture(C), lambda p, r: (1 - C) * p + C * r),
  "policy at temperature 2, of 2": (
    Policy(Sampling(temperature=2.0, top_k=2)),
    lambda p, r: np.where(p < np.sort(p, axis=-1)[..., -2:-1], -np.inf, p / 2),
  ),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "mixture" else pytest.mark.slow) for n in SAMPLERS])
def test_strings_are_drawn_as_often_as_their_law_says(name):
  sampler, mix = SAMPLERS[name]
  expected = np.exp(tokenwise(mix))
  rows = 4096
  with small.use():
    make = jax.jit(functools.partial(draw, sampler, tokens=LENGTH))
    made = make(model(0), model(1), *prompts(rows).values(), jax.random.key(5))
  counts = np.bincount(np.asarray(made.tokens) @ [VOCAB, 1], minlength=16) / rows
  error = np.sqrt(expected * (1 - expected) / rows)
  assert (np.abs(counts - expected) <= 4.5 * error + 1e-12).all()


def test_a_mixture_by_tokens_is_not_the_mixture_of_responses():
  policy, reference = (x.sum(1) for x in laws())
  whole = np.asarray(jax.nn.log_softmax((1 - C) * policy + C * reference))
  by_tokens = tokenwise(lambda p, r: (1 - C) * p + C * r)
  assert np.abs(np.exp(whole) - np.exp(by_tokens)).max() > 1e-3
  # of one token they are the same: a finite set of responses has the exact mixture
  first = GeometricMixture(C).logits(jnp.asarray(policy), jnp.asarray(reference))
  np.testing.assert_allclose(jax.nn.log_softmax(first), whole, rtol=1e-6)
  for c, end in ((0.0, policy), (1.0, reference)):
    np.testing.assert_allclose(tokenwise(lambda p, r: (1 - c) * p + c * r), end, atol=1e-5)


@pytest.mark.parametrize("coefficient", [-0.1, 1.5])
def test_a_mixture_coefficient_outside_0_and_1_is_refused(coefficient):
  with pytest.raises(UserError, match=f"coefficient={coefficient}: of a mixture lies in"):
    GeometricMixture(coefficient)


def test_a_response_ends_with_its_first_stop_id():
  with small.use():
    make = jax.jit(functools.partial(draw, Uniform(), tokens=6, stop=(3,)))
    made = make(model(0), model(1), *prompts(64).values(), jax.random.key(0))
  for ids, mask in zip(np.asarray(made.tokens), np.asarray(made.mask), strict=True):
    length = int(mask.sum())
    assert mask[:length].all()
    assert 3 not in ids[: length - 1]
    assert length == 6 or ids[length - 1] == 3
  assert 1 < np.asarray(made.mask).sum(1).mean() < 6


CYCLE = oracles.cyclic(
  np.array([[0, 1, -1, 0], [-1, 0, 1, 0], [1, -1, 0, 0], [0, 0, 0, 0.0]]),
  4.0,
  lambda prompt, y: jnp.mean(jax.nn.one_hot(y.tokens, VOCAB), axis=1),
)


def step(name, rows=8, seed=0, **options):
  """(parameters after a step on the current mesh, means)."""
  method = methods.METHODS[name]
  tx = optax.sgd(0.05)
  tx = updates.remembering(tx) if method.update == "optimistic" else tx

  online = OnlineConfig(name, b=0.5, tokens=LENGTH, **options)

  @jax.jit
  def run(policy, reference, batch):
    move = functools.partial(updates.UPDATES[method.update], gradient(online, CYCLE, reference, batch), tx)
    moved, _, (means, *_) = move(policy, tx.init(policy), jax.random.key(seed))
    return moved, means

  policy, means = jax.block_until_ready(run(model(0), model(1), prompts(rows)))
  return policy, means


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in methods.METHODS])
def test_an_update_is_the_same_on_one_device_and_on_four(name):
  options = {"alpha": 0.1} if name == "xpo" else {}
  with small.use():
    whole, means = step(name, **options)
    before = model(0)
  moved = [np.abs(a - b).max() for a, b in zip(small.leaves(whole), small.leaves(before), strict=True)]
  assert max(moved) > 1e-4
  assert np.isfinite(float(means["loss"].value))
  with small.use(MeshConfig(2, 2, 1, "replicated"), devices=4):
    cut, cut_means = step(name, **options)
  for a, b in zip(small.leaves(cut), small.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
  np.testing.assert_allclose(float(cut_means["loss"].value), float(means["loss"].value), rtol=1e-4)


@pytest.mark.slow
def test_online_ipo_beats_its_start_on_a_transitive_preference():
  oracle = oracles.BradleyTerry(lambda prompt, y: 3.0 * jnp.mean(y.tokens == 1, axis=1))
  tx = optax.adam(3e-3)

  @jax.jit
  def run(policy, opt, reference, batch, key):
    online = OnlineConfig("online_ipo_policy", b=0.3, tokens=LENGTH)
    return updates.plain(gradient(online, oracle, reference, batch), tx, policy, opt, key)

  with small.use():
    policy, reference = model(0), model(0)
    opt, batch = jax.jit(tx.init)(policy), prompts(64)
    for t in range(60):
      policy, opt, (means, *_) = run(policy, opt, reference, batch, jax.random.key(t))
    made = [
      jax.jit(functools.partial(draw, Policy(), tokens=LENGTH))(m, m, *prompts(512).values(), jax.random.key(9))
      for m in (policy, reference)
    ]
    wins = oracle.prob(None, *made)
  assert float(jnp.mean(wins)) > 0.6
  assert isinstance(means["loss"], Mean)
