"""Every preference loss alike: micro-batches and shards add up, padding is not read, only the policy has gradients."""

import functools

import jax
from jax import P
from jax import numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.mesh import BATCH
from research.metrics import add
from research.preference import losses
from tests import small

pytestmark = pytest.mark.usefixtures("float64")


def table(reduce="sum"):
  """name -> loss of (logp, reference, wins [batch, 2], mask), all of [batch, 2, length], on the rows of a batch.

  For those with a mean over the batch: (the Mean of a part, loss of its value and the same).
  """
  first = lambda a: a[:, 0]
  pair = lambda f, **kw: lambda x, r, w, m: f(x, r, first(w), m, reduce=reduce, **kw)
  plain = {
    "dpo": pair(losses.dpo, b=0.3, smoothing=0.1),
    "ipo": pair(losses.ipo, b=0.3),
    "ipo_against": lambda x, r, w, m: losses.ipo_against(x, r, w, m, b=0.3, reduce=reduce),
    "sppo": lambda x, r, w, m: losses.sppo(x, r, w, m, b=0.5, reduce=reduce),
    "inpo": lambda x, r, w, m: losses.inpo(x, r, 0.9 * r, first(w), m, eta=0.5, b=0.2, reduce=reduce),
    "onpo": pair(losses.onpo, eta=0.5),
    "nash_md": lambda x, r, w, m: losses.nash_md(first(x), first(r), first(w), first(m), b=0.2),
    "xpo": pair(losses.xpo, b=0.3, alpha=0.1),
    "apo": lambda x, r, w, m: losses.dpo(x, losses.extrapolated(r, 0.9 * r, 0.5), first(w), m, b=0.3, reduce=reduce),
    "listwise": lambda x, r, w, m: losses.listwise(x, r, w, m, b=0.3, reduce=reduce),
  }
  with_mean = {
    "kto": (
      lambda x, r, w, m: losses.kto_baseline(x[:, 1], r[:, 1], m[:, 1], reduce=reduce),
      lambda z, x, r, w, m: losses.kto(first(x), first(r), first(w) > 0.5, first(m), z, b=0.3, reduce=reduce),
    ),
    "bco": (
      lambda x, r, w, m: losses.bco_shift(first(x), first(r), first(m), b=0.3, reduce=reduce),
      lambda z, x, r, w, m: losses.bco(first(x), first(r), first(w) > 0.5, first(m), z, b=0.3, reduce=reduce),
    ),
  }
  none = lambda x, r, w, m: losses.over_rows(jnp.zeros(len(x)))
  ignoring = lambda f: lambda z, *args: f(*args)
  return {name: (none, ignoring(f)) for name, f in plain.items()} | with_mean


def data(rows=8, length=5, seed=0):
  rng = np.random.default_rng(seed)
  logp, reference = -rng.random((2, rows, 2, length)) * 3
  mask = (np.arange(length) < rng.integers(1, length + 1, size=(rows, 2, 1))).astype(float)
  return logp, reference, rng.random((rows, 2)), mask


@functools.cache
def compiled(name, reduce):
  shared, loss = table(reduce)[name]

  def total(logp, rest, z):
    mean = losses.over_rows(loss(z, logp, *rest))
    return mean.total, mean

  return jax.jit(lambda *part: shared(*part)), jax.jit(jax.grad(total, has_aux=True))


def summed(name, parts, reduce="sum"):
  """(loss, gradient by logp) of sum / weight over all parts, the mean they share made in a first pass."""
  shared, grad = compiled(name, reduce)
  z = sum((shared(*part) for part in parts[1:]), shared(*parts[0])).value
  grads, means = zip(*(grad(logp, rest, z) for logp, *rest in parts), strict=True)
  mean = functools.reduce(add, ({"loss": m} for m in means))["loss"]
  return np.asarray(mean.value), np.concatenate([np.asarray(g) for g in grads]) / float(mean.weight)


@pytest.mark.parametrize("name", table())
def test_micro_batches_add_up_to_the_batch(name):
  whole = data()
  parts = [tuple(x[at : at + size] for x in whole) for at, size in ((0, 2), (2, 6))]
  for got, want in zip(summed(name, parts), summed(name, [whole]), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_rows_that_are_padding_move_neither_ktos_baseline_nor_bcos_shift():
  logp, reference, _, mask = (x[:, 0] if x.ndim == 3 else x for x in data())
  weights = np.repeat([1.0, 0.0], [5, 3])
  for f in (losses.kto_baseline, functools.partial(losses.bco_shift, b=0.3)):
    kept, whole = f(logp[:5], reference[:5], mask[:5]).value, f(logp, reference, mask).value
    np.testing.assert_allclose(f(logp, reference, mask, weights=weights).value, kept, rtol=1e-12)
    assert abs(float(whole - kept)) > 1e-3


def test_a_shift_of_each_micro_batch_would_change_the_gradients():
  whole = data()
  parts = [tuple(x[at : at + 4] for x in whole) for at in (0, 4)]
  apart = np.concatenate([summed("bco", [part])[1] for part in parts]) / 2
  assert np.abs(apart - summed("bco", [whole])[1]).max() > 1e-4


@pytest.mark.parametrize("name", ["dpo", "nash_md", "kto", "bco", "listwise"])
def test_a_sharded_batch_is_the_whole_one(name):
  whole = data()
  want = summed(name, [whole])
  with small.use(small.MeshConfig(2, 2, 1, "replicated"), devices=4):
    mesh = jax.sharding.get_mesh()
    place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, P(BATCH, *[None] * (x.ndim - 1))))
    got = jax.block_until_ready(summed(name, [tuple(map(place, whole))]))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(("name", "reduce"), [*((name, "sum") for name in table()), ("dpo", "mean"), ("bco", "mean")])
def test_empty_responses_and_what_stands_in_padding_change_nothing(name, reduce):
  logp, reference, wins, mask = data(rows=4)
  mask[0, 0], mask[1] = 0, 0
  value, grad = summed(name, [(np.where(mask > 0, logp, 0), np.where(mask > 0, reference, 0), wins, mask)], reduce)
  assert np.isfinite(value)
  assert np.isfinite(grad).all()
  spoilt = [np.where(mask > 0, x, np.nan) for x in (logp, reference)]
  again = summed(name, [(*spoilt, wins, mask)], reduce)
  np.testing.assert_allclose(again[0], value, atol=1e-12)
  np.testing.assert_allclose(again[1], grad, atol=1e-12)
  # on the left or on the right, and however much
  order = np.argsort(mask, axis=-1, kind="stable")
  padded = [np.pad(np.take_along_axis(x, order, -1), ((0, 0), (0, 0), (2, 0))) for x in (logp, reference, mask)]
  if name != "nash_md":  # its surrogate knows an order, which this one keeps; checked by enumeration
    np.testing.assert_allclose(summed(name, [(*padded[:2], wins, padded[2])], reduce)[0], value, atol=1e-12)


@pytest.mark.parametrize("name", table())
def test_compiled_losses_are_those_step_by_step(name):
  shared, loss = table()[name]
  rows = lambda *part: loss(shared(*part).value, *part)
  with jax.disable_jit():
    plain = rows(*map(jnp.asarray, data()))
  np.testing.assert_allclose(jax.jit(rows)(*data()), plain, rtol=1e-12)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_no_gradient_goes_through_the_mean_over_the_batch(name):
  shared, loss = table()[name]
  logp, *rest = data()
  z = shared(logp, *rest).value
  through = jax.jit(jax.grad(lambda x: jnp.sum(loss(shared(x, *rest).value, x, *rest))))(logp)
  given = jax.jit(jax.grad(lambda x: jnp.sum(loss(z, x, *rest))))(logp)
  np.testing.assert_allclose(through, given, atol=1e-12)


@pytest.mark.parametrize("name", ["dpo", "sppo", "nash_md", "kto"])
def test_bfloat16_log_probabilities_give_float32_losses(name):
  whole = data()
  narrow = tuple(jnp.asarray(x, jnp.bfloat16) for x in whole)
  shared, loss = table()[name]
  rows = loss(shared(*narrow).value, *narrow)
  assert rows.dtype == jnp.float32
  np.testing.assert_allclose(rows, loss(shared(*whole).value, *whole), rtol=0.1, atol=0.1)


def test_only_the_policy_gets_gradients():
  logp, reference, wins, mask = data()
  for shared, loss in table().values():
    total = lambda reference, wins: jnp.sum(
      loss(shared(logp, reference, wins, mask).value, logp, reference, wins, mask)
    )
    for grad in jax.grad(total, argnums=(0, 1))(jnp.asarray(reference), jnp.asarray(wins)):
      np.testing.assert_array_equal(grad, 0)


def test_sum_and_mean_are_what_a_hand_computes():
  logp = np.array([[-1.0, -2.0, -3.0]])
  mask = np.array([[1.0, 1.0, 0.0]])
  assert float(losses.log_prob(logp, mask, "sum")[0]) == -3
  assert float(losses.log_prob(logp, mask, "mean")[0]) == -1.5
  with pytest.raises(UserError, match="reduce=token: use sum or mean"):
    losses.log_prob(logp, mask, "token")
  with pytest.raises(UserError, match="mask="):
    losses.log_prob(logp, mask[:, :2])
  with pytest.raises(UserError, match="logp="):
    losses.dpo(logp, logp, np.ones(1), mask, b=0.1)
  with pytest.raises(UserError, match="preference="):
    losses.ipo_against(np.zeros((3, 2, 1)), np.zeros((3, 2, 1)), np.ones(3), np.ones((3, 2, 1)), b=1.0)
