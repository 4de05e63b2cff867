import functools

import jax
from jax.extend.core import jaxprs_in_params
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.kernels.cross_entropy import reference, xla
from research.kernels.cross_entropy.api import cross_entropy, row_cross_entropy
from research.mesh import MeshConfig, make_mesh

grads = jax.value_and_grad(cross_entropy, argnums=(0, 1))


def operands(batch=4, length=72, width=24, vocab=96, dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((batch, length, width)).astype(dtype)
  w = rng.standard_normal((width, vocab)).astype(dtype)
  targets = rng.integers(0, vocab, (batch, length)).astype(np.int32)
  weights = rng.uniform(0.5, 1.5, (batch, length)).astype(np.float32)
  weights[:, -5:] = 0
  return x, w, targets, weights


def truth(x, w, targets, weights):
  """(loss, (dx, dw)) in float64."""
  with jax.enable_x64(True):
    x, w, weights = (jnp.asarray(a, jnp.float64) for a in (x, w, weights))
    f = jax.value_and_grad(reference.cross_entropy, argnums=(0, 1))
    return jax.tree.map(np.asarray, jax.jit(f)(x, w, targets, weights))


def relative_errors(got, want):
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  return [np.abs(np.asarray(g, np.float64) - w).max() / np.abs(w).max() for g, w in pairs]


def test_the_reference_is_the_definition():
  x, w, targets, weights = operands(2, 5, 3, 7)
  total = 0.0
  for i in np.ndindex(2, 5):
    logits = x[i].astype(np.float64) @ w.astype(np.float64)
    total -= weights[i] * (logits[targets[i]] - np.log(np.exp(logits).sum()))
  np.testing.assert_allclose(truth(x, w, targets, weights)[0], total, rtol=1e-6)


def test_value_and_gradients_are_those_of_float64():
  args = operands()
  loss, _ = want = truth(*args)
  assert max(relative_errors(jax.jit(grads)(*args), want)) < 1e-6
  np.testing.assert_allclose(jax.jit(cross_entropy)(*args), loss, rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 100, 512])
def test_the_chunk_size_does_not_matter(chunk):
  args = operands()
  loss, (dx, dw) = truth(*args)
  got = jax.jit(functools.partial(xla.value_and_grads, chunk=chunk))(*args)  # no gradient of a bias
  assert max(relative_errors(got, (loss, dx, dw))) < 1e-6
  np.testing.assert_allclose(jax.jit(functools.partial(xla.value, chunk=chunk))(*args), loss, rtol=1e-6)


def test_bfloat16_gradients_are_rounded_once_after_scaling():
  x, w, targets, weights = operands()
  x, w = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
  mean = lambda x, w: cross_entropy(x, w, targets, weights) / 237
  loss, (dx, dw) = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(x, w)
  want_loss, want = truth(x, w, targets, weights)
  assert (dx.dtype, dw.dtype, loss.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  np.testing.assert_allclose(loss, want_loss / 237, rtol=1e-6)
  rms = lambda a: np.sqrt(np.mean(np.square(a)))
  for got, exact in zip((dx, dw), want, strict=True):
    exact = exact / 237
    best = rms(np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64) - exact)
    assert rms(np.asarray(got, np.float64) - exact) < 1.5 * best


def test_gradients_reach_float32_weights_through_a_bfloat16_cast():
  x, w, targets, weights = operands()
  low = jnp.asarray(x, jnp.bfloat16)
  dw = jax.jit(jax.grad(lambda w: cross_entropy(low, w.astype(jnp.bfloat16), targets, weights)))(w)
  assert dw.dtype == jnp.float32
  _, (_, want) = truth(low, jnp.asarray(w, jnp.bfloat16), targets, weights)
  assert np.abs(dw - want).max() < 0.01 * np.abs(want).max()


def test_a_position_of_weight_zero_takes_no_part_even_if_it_is_nan():
  x, w, targets, weights = operands()
  clean = jax.jit(grads)(x, w, targets, weights)
  x[:, -5:] = np.nan
  targets[:, -5:] = -100
  poisoned = jax.jit(grads)(x, w, targets, weights)
  jax.tree.map(np.testing.assert_array_equal, poisoned, clean)
  assert (np.asarray(poisoned[1][0])[:, -5:] == 0).all()
  assert np.isfinite(jax.jit(cross_entropy)(x, w, targets, weights))


def test_a_nan_that_counts_is_not_hidden():
  x, w, targets, weights = operands()
  x[0, 0] = np.nan
  assert np.isnan(jax.jit(cross_entropy)(x, w, targets, weights))


def test_huge_logits_stay_finite_and_right():
  x, w, targets, weights = operands()
  args = (1e4 * x, w, targets, weights)
  assert max(relative_errors(jax.jit(grads)(*args), truth(*args))) < 1e-5


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(
  "mesh", [{"data": 4}, {"data": 2, "model": 2}, {"data": 1, "model": 4}, {"replica": 2, "data": 2}]
)
def test_a_sharded_call_gives_the_unsharded_result(mesh, implementation):
  args = operands()
  args = (3 * args[0], 3 * args[1], *args[2:])  # larger logits: the shards' maxima lie far apart
  want = truth(*args)
  f = jax.value_and_grad(functools.partial(cross_entropy, implementation=implementation), argnums=(0, 1))
  with jax.set_mesh(make_mesh(MeshConfig(**mesh))):
    batch = ("replica", "data")
    # w comes cut along `data` too, as parameters are kept.
    specs = (jax.P(batch, None, None), jax.P("data", "model"), jax.P(batch, None), jax.P(batch, None))
    args = [jax.device_put(a, s) for a, s in zip(args, specs, strict=True)]
    loss, (dx, dw) = jax.jit(f)(*args)
    assert (dx.sharding.spec, dw.sharding.spec) == specs[:2]
    assert max(relative_errors((loss, (dx, dw)), want)) < 5e-6
    np.testing.assert_allclose(
      jax.jit(functools.partial(cross_entropy, implementation=implementation))(*args), want[0], rtol=1e-6
    )


def row_operands(**sizes):
  """Operands with a bias, and how much each row counts."""
  args = operands(**sizes)
  rng = np.random.default_rng(1)
  bias = rng.standard_normal(args[1].shape[1]).astype(np.float32)
  return (*args, bias), rng.standard_normal(len(args[0])).astype(np.float32)


def row_grads(counts, x, w, targets, weights, bias, **options):
  """(rows, gradients by x, w and bias) of rows that count as much as their value says, too."""

  def f(x, w, bias):
    rows = row_cross_entropy(x, w, targets, weights, bias, **options)
    return jnp.sum(counts * rows**2 / 1000), rows

  (_, rows), gradients = jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)(x, w, bias)
  return rows, gradients


def row_truth(counts, args):
  with jax.enable_x64(True):
    args = [jnp.asarray(a, jnp.float64) if a.dtype == np.float32 else a for a in args]
    f = jax.jit(functools.partial(row_grads, implementation="reference"))
    return jax.tree.map(np.asarray, f(jnp.asarray(counts, jnp.float64), *args))


def test_rows_and_their_gradients_are_those_of_float64_and_add_up_to_the_whole():
  args, counts = row_operands()
  rows, _ = want = row_truth(counts, args)
  assert max(relative_errors(jax.jit(row_grads)(counts, *args), want)) < 2e-6
  no_bias = jax.jit(row_cross_entropy)(*args[:4])
  np.testing.assert_allclose(no_bias.sum(), jax.jit(cross_entropy)(*args[:4]), rtol=1e-6)
  assert np.abs(no_bias - rows).max() > 1


@pytest.mark.parametrize("mesh", [{"data": 2, "model": 2}, {"replica": 2, "data": 2}])
def test_rows_on_several_devices_are_those_of_one(mesh):
  args, counts = row_operands()
  want = row_truth(counts, args)
  with jax.set_mesh(make_mesh(MeshConfig(**mesh))):
    batch = ("replica", "data")
    specs = (jax.P(batch, None, None), jax.P("data", "model"), jax.P(batch, None), jax.P(batch, None), jax.P("model"))
    args = [jax.device_put(a, s) for a, s in zip(args, specs, strict=True)]
    rows, grads = jax.jit(row_grads)(jax.device_put(counts, jax.P(batch)), *args)
    assert [g.sharding.spec for g in grads] == [specs[0], specs[1], specs[4]]
    assert max(relative_errors((rows, grads), want)) < 5e-6


def test_gradients_of_rows_hold_no_logits_of_the_whole_batch():
  args, counts = row_operands(batch=2, length=1024, width=16, vocab=8192)
  temp = lambda **options: (
    jax.jit(functools.partial(row_grads, **options)).lower(counts, *args).compile().memory_analysis().temp_size_in_bytes
  )
  logits = 4 * 2048 * 8192
  assert temp(implementation="reference") >= logits
  assert temp() < 0.4 * logits


def test_one_small_collective_stands_inside_the_loop():
  # The one that tells every shard the softmax's denominators: 3 numbers a token.
  with jax.set_mesh(make_mesh(MeshConfig(data=2, model=2))):
    jaxpr = jax.make_jaxpr(grads)(*operands(batch=4, length=1024, vocab=16384))

  def collectives(jaxpr, inside):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name.startswith(("psum", "all_gather", "pmax")):
        yield eqn.primitive.name, inside
      for sub in jaxprs_in_params(eqn.params):
        yield from collectives(sub, inside or eqn.primitive.name == "scan")

  found = sorted(collectives(jaxpr.jaxpr, False))
  assert [name for name, inside in found if inside] == ["all_gather"]
  assert len([name for name, inside in found if not inside]) == 3  # dx over model; loss and dw over the batch


def test_the_logits_of_the_whole_batch_are_never_held():
  x, w, targets, weights = operands(batch=1, length=2048, width=16, vocab=8192)
  naive = jax.value_and_grad(functools.partial(cross_entropy, implementation="reference"), argnums=(0, 1))
  temp = lambda f: jax.jit(f).lower(x, w, targets, weights).compile().memory_analysis().temp_size_in_bytes
  logits = 4 * 2048 * 8192
  assert temp(naive) >= logits
  assert temp(grads) < 0.4 * logits
  assert temp(cross_entropy) < 0.4 * logits


def test_the_value_alone_takes_one_matrix_product_and_the_gradients_two_more():
  args = operands()
  products = lambda f: jax.jit(f).lower(*args).as_text().count("stablehlo.dot_general")
  assert products(cross_entropy) == 1
  assert products(grads) == 3


def test_chunks_are_full_and_within_their_budget():
  for tokens in (1, 7, 128, 1000, 8192, 100_000):
    for vocab in (256, 50304, 128256):
      chunk = xla.chunk_size(tokens, vocab, xla.LOGITS_BYTES)
      count = -(-tokens // chunk)
      assert chunk <= max(xla.LOGITS_BYTES // (4 * vocab), xla.MIN_CHUNK) + 8
      assert count * chunk - tokens < 8 * count


def test_the_same_call_gives_the_same_bits():
  args = operands()
  f = jax.jit(grads)
  jax.tree.map(np.testing.assert_array_equal, f(*args), f(*args))


def test_differentiating_by_the_weights_is_refused():
  x, w, targets, weights = operands()
  with pytest.raises(UserError, match="weights="):
    jax.grad(cross_entropy, argnums=3)(x, w, targets, weights)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"w": np.zeros((23, 96), np.float32)}, "w="),
    ({"w": jnp.zeros((24, 96), jnp.bfloat16)}, "w=bfloat16"),
    ({"targets": np.zeros((4, 71), np.int32)}, "targets="),
    ({"implementation": "torch"}, "implementation=torch: use one of xla, reference"),
  ],
)
def test_what_does_not_fit_is_named(change, message):
  names = ("x", "w", "targets", "weights")
  with pytest.raises(UserError, match=message):
    cross_entropy(**(dict(zip(names, operands(), strict=True)) | change))


def test_a_vocabulary_that_the_mesh_cannot_cut_is_named():
  with jax.set_mesh(make_mesh(MeshConfig(data=1, model=4))), pytest.raises(UserError, match=r"vocab=94.*mesh.model=4"):
    cross_entropy(*operands(vocab=94))
