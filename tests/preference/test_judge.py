"""A judge that reads pairs, and fine-tuning on chosen responses: what they read, and what changes nothing."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from research.models.transformer import Transformer
from research.preference import judge, oracles, supervised
from research.preference.samplers import token_log_probs
from tests import small

STOP, VOCAB = 7, 16
TINY = small.varied(vocab=VOCAB, width=16, layers=2, heads=2, kv_heads=1, mlp_width=16)


@functools.cache
def model():
  """Far from uniform: a fresh model is nearly so."""
  with small.use():
    return jax.tree.map(lambda x: 3 * x, Transformer(jax.random.key(0), TINY))


def pairs(prompt_room=4, response_room=6, filler=0, rows=6):
  """Prompts of one to three ids and responses of zero to five, the same ones whatever room and filler they have."""
  rng = np.random.default_rng(0)
  out = {
    "prompts": np.full((rows, prompt_room), filler, np.int32),
    "lengths": 1 + np.arange(rows, dtype=np.int32) % 3,
    "responses": np.full((rows, 2, response_room), filler, np.int32),
    "mask": np.zeros((rows, 2, response_room), np.float32),
    "weights": np.ones(rows, np.float32),
  }
  for i in range(rows):
    n = out["lengths"][i]
    out["prompts"][i, prompt_room - n :] = rng.integers(8, VOCAB, n)
    for j in range(2):
      n = (i + j) % 6
      out["responses"][i, j, :n] = rng.integers(8, VOCAB, n)
      out["mask"][i, j, :n] = 1
  return out


def asked(batch):
  """(prompts, chosen, rejected) on the current mesh."""
  batch = jax.tree.map(jnp.asarray, batch)
  return batch, *judge.chosen_and_rejected(batch)


@functools.cache
def odds(prompt_room=4, response_room=6, filler=0):
  with small.use():
    ask = jax.jit(functools.partial(judge.log_odds, stop=STOP))
    return np.asarray(ask(model(), *asked(pairs(prompt_room, response_room, filler))))


@functools.cache
def swapped():
  """The same of the two responses in the other order."""
  with small.use():
    batch, y, y2 = asked(pairs())
    return np.asarray(jax.jit(functools.partial(judge.log_odds, stop=STOP))(model(), batch, y2, y))


@pytest.mark.slow
def test_what_a_judge_reads_is_the_row_without_its_padding():
  batch = pairs()
  with small.use():
    for i in (0, 1, 4, 5):  # an empty response among them
      prompt = batch["prompts"][i][-batch["lengths"][i] :]
      first, second = (batch["responses"][i, j][batch["mask"][i, j] > 0] for j in range(2))
      ids = np.concatenate([prompt, first, [STOP], second, [STOP]]).astype(np.int32)[None]
      logits = np.asarray(model().logits(ids, np.ones_like(ids), np.arange(ids.shape[1], dtype=np.int32)[None]))[0, -1]
      np.testing.assert_allclose(odds()[i], logits[0] - logits[1], atol=1e-4)


@pytest.mark.parametrize("room", [(4, 6, 9), (7, 6, 3), (4, 9, 5)], ids=["filler", "left", "right"])
def test_padding_and_what_stands_in_it_do_not_change_a_verdict(room):
  np.testing.assert_allclose(odds(*room), odds(), atol=1e-4)


def test_a_judge_keeps_the_oracles_contract_though_its_reading_has_an_order():
  with small.use():
    batch, y, y2 = asked(pairs())
    oracle = judge.oracle(model(), STOP)
    oracles.checked(oracle, batch, y, y2)
  assert np.abs(odds() + swapped()).max() > 0.1


def test_the_judges_loss_is_the_cross_entropy_of_both_orders_and_rows_of_weight_0_do_not_count():
  batch = pairs()
  batch["weights"][3:] = 0
  with small.use():
    means = jax.jit(functools.partial(judge.loss, key=None, stop=STOP))(model(), jax.tree.map(jnp.asarray, batch))
  there, back = odds()[:3], swapped()[:3]
  assert float(means["loss"].value) == pytest.approx(np.log1p(np.exp([-there, back])).mean(), rel=1e-4)
  p = (1 / (1 + np.exp(-there)) + 1 / (1 + np.exp(back))) / 2
  assert float(means["accuracy"].value) == pytest.approx(np.where(np.abs(p - 0.5) < 1e-6, 0.5, p > 0.5).mean())


def test_a_judge_learns_a_preference_that_goes_in_circles():
  """8 beats 9 beats 10 beats 8: no score a response can have says so."""
  rng = np.random.default_rng(0)
  batch = pairs(3, 5, rows=48)
  won = rng.integers(3, size=48)
  batch["mask"][:] = np.arange(5) == 0
  batch["responses"][:, :, 0] = 8 + np.stack([won, (won + 1) % 3], axis=1)
  batch = jax.tree.map(jnp.asarray, batch)
  tx = optax.adam(1e-2)
  with small.use():
    learner = Transformer(jax.random.key(1), TINY)

    @jax.jit
    def step(m, opt):
      f = lambda m: (lambda means: (means["loss"].value, means))(judge.loss(m, batch, None, stop=STOP))
      grads, means = jax.grad(f, has_aux=True)(m)
      updates, opt = tx.update(grads, opt, m)
      return optax.apply_updates(m, updates), opt, means

    opt = jax.jit(tx.init)(learner)
    for _ in range(80):
      learner, opt, means = step(learner, opt)
  assert float(means["accuracy"].value) == 1
  assert float(means["loss"].value) < 0.3


@functools.cache
def fine_tuning(prompt_room=4, response_room=6, filler=0):
  """(total, weight, gradients)."""
  batch = pairs(prompt_room, response_room, filler)
  with small.use():
    f = lambda m, b: (lambda mean: (mean.total, mean))(supervised.loss(m, b, None)["loss"])
    grads, mean = jax.jit(jax.grad(f, has_aux=True))(model(), jax.tree.map(jnp.asarray, batch))
  return float(mean.total), float(mean.weight), small.leaves(grads)


def test_fine_tuning_learns_the_chosen_responses_and_nothing_else():
  batch = pairs()
  total, weight, _ = fine_tuning()
  with small.use():
    of = jax.jit(token_log_probs)
    placed, chosen, _ = asked(batch)
    logp = np.asarray(of(model(), placed["prompts"], placed["lengths"], chosen))
  assert weight == batch["mask"][:, 0].sum()  # the first row's response is empty
  assert total == pytest.approx(-(logp * batch["mask"][:, 0]).sum(), rel=1e-4)


@pytest.mark.parametrize("room", [(4, 6, 9), (7, 6, 3), (4, 9, 5)], ids=["filler", "left", "right"])
def test_padding_does_not_change_fine_tuning(room):
  total, weight, grads = fine_tuning(*room)
  expected_total, expected_weight, expected = fine_tuning()
  assert weight == expected_weight
  assert total == pytest.approx(expected_total, rel=1e-5)
  for a, b in zip(grads, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())  # in float32, and gradients reach hundreds


def test_a_batch_of_empty_responses_is_no_loss_and_no_nan():
  batch = pairs()
  batch["mask"][:] = 0
  with small.use():
    f = lambda m, b: supervised.loss(m, b, None)["loss"].value
    value, grads = jax.jit(jax.value_and_grad(f))(model(), jax.tree.map(jnp.asarray, batch))
  assert float(value) == 0
  assert all((g == 0).all() for g in small.leaves(grads))
