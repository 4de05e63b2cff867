import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.kernels.attention import reference, splash, xla
from research.kernels.attention.api import attention
from research.kernels.attention.cases import CASES
from research.mesh import MeshConfig, make_mesh

# On a CPU splash runs in Pallas's interpreter.
LOCAL = {"xla": xla.attention, "splash": functools.partial(splash.attention, interpret=True)}


def operands(batch, length, heads, kv_heads, head_dim, dtype=np.float64, segments=True):
  """q, k, v, segment ids (packed at random, so that rows differ) and a cotangent."""
  rng = np.random.default_rng(0)
  q, k, v, ct = (rng.standard_normal((batch, length, h, head_dim)) for h in (heads, kv_heads, kv_heads, heads))
  ids = np.sort(rng.integers(0, 4, (batch, length)), axis=1).astype(np.int32) if segments else None
  return *(x.astype(dtype) for x in (q, k, v)), ids, ct.astype(dtype)


def value_and_grads(f, q, k, v, ids, ct):
  out, vjp = jax.vjp(lambda q, k, v: f(q, k, v, ids), q, k, v)
  return out, *vjp(ct)


def truth(q, k, v, ids, ct):
  """Value and gradients in float64."""
  with jax.enable_x64(True):
    scale = 1 / math.sqrt(q.shape[-1])
    args = (jnp.asarray(x, jnp.float64) for x in (q, k, v))
    f = functools.partial(reference.attention, scale=scale)
    return jax.tree.map(
      np.asarray, jax.jit(functools.partial(value_and_grads, f))(*args, ids, jnp.asarray(ct, "float64"))
    )


def relative_errors(got, want):
  """Of the largest number; of 1 where the truth is 0 throughout (a single position has no use for q and k)."""
  size = lambda x: np.abs(x).max()
  return [size(np.asarray(g, np.float64) - w) / (size(w) or 1) for g, w in zip(got, want, strict=True)]


def local(name, head_dim):
  return jax.jit(functools.partial(value_and_grads, functools.partial(LOCAL[name], scale=1 / math.sqrt(head_dim))))


def test_the_reference_is_the_definition():
  q, k, v, ids, _ = operands(2, 7, 4, 2, 3)
  with jax.enable_x64(True):
    got = reference.attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), ids, scale=0.3)
  for b, t, h in np.ndindex(2, 7, 4):
    seen = [s for s in range(t + 1) if ids[b, s] == ids[b, t]]
    scores = np.array([0.3 * q[b, t, h] @ k[b, s, h // 2] for s in seen])
    probs = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(
      got[b, t, h], sum(p * v[b, s, h // 2] for p, s in zip(probs, seen, strict=True)), rtol=1e-12
    )


@pytest.mark.parametrize(
  ("name", "shape", "segments"),
  [
    ("xla", (2, 256, 4, 4, 32), True),
    ("xla", (3, 90, 4, 2, 32), False),  # grouped heads; a last block that is not full
    ("xla", (2, 70, 6, 1, 16), True),  # one key-value head for all
    ("xla", (2, 1, 2, 2, 8), True),
    ("splash", (1, 256, 2, 2, 64), False),
    ("splash", (2, 200, 4, 2, 32), True),  # padded to 256
    ("splash", (1, 128, 2, 1, 128), True),
  ],
)
def test_values_and_gradients_are_the_references(name, shape, segments):
  args = operands(*shape, dtype=np.float32, segments=segments)
  errors = relative_errors(local(name, shape[-1])(*args), truth(*args))
  assert max(errors) < 3e-6


@pytest.mark.parametrize("name", LOCAL)
def test_bfloat16_is_as_good_as_bfloat16_gets(name):
  args = operands(1, 128, 4, 2, 64)
  args = *(jnp.asarray(x, jnp.bfloat16) for x in args[:3]), args[3], jnp.asarray(args[4], jnp.bfloat16)
  got, want = local(name, 64)(*args), truth(*args)
  assert all(x.dtype == jnp.bfloat16 for x in got)
  rms = lambda x: np.sqrt(np.mean(np.square(x)))
  # Against the truth rounded once, the best a bfloat16 result can be.
  for g, w in zip(got, want, strict=True):
    rounded = np.asarray(jnp.asarray(w, jnp.bfloat16), np.float64)
    assert rms(np.asarray(g, np.float64) - w) < 2 * rms(rounded - w)


def test_float64_stays_float64():
  args = operands(2, 70, 4, 2, 16)
  with jax.enable_x64(True):
    got = local("xla", 16)(*(jnp.asarray(x) for x in args))
    assert max(relative_errors(got, truth(*args))) < 1e-13


def test_recomputing_the_exponentials_changes_nothing(monkeypatch):
  args = operands(2, 100, 4, 2, 32, dtype=np.float32)
  f = functools.partial(value_and_grads, functools.partial(xla.attention, scale=0.2))
  products = lambda lowered: lowered.as_text().count("stablehlo.dot_general")
  kept = jax.jit(f).lower(*args)
  monkeypatch.setattr(xla, "KEPT_BYTES", 0)
  recomputed = jax.jit(lambda *args: f(*args)).lower(*args)
  assert products(recomputed) == products(kept) + 2  # one for each block
  assert max(relative_errors(recomputed.compile()(*args), kept.compile()(*args))) < 1e-6


def test_taking_rows_in_groups_changes_nothing(monkeypatch):
  args = operands(6, 100, 2, 2, 16, dtype=np.float32)
  f = functools.partial(value_and_grads, functools.partial(xla.attention, scale=0.2))
  whole = jax.jit(f)(*args)
  monkeypatch.setattr(xla, "SCORES_BYTES_CPU", 3 * 2 * 36 * 100 * 4)  # three rows of the last block
  lowered = jax.jit(lambda *args: f(*args)).lower(*args)
  assert "stablehlo.while" in lowered.as_text()
  assert max(relative_errors(lowered.compile()(*args), whole)) < 1e-6


@pytest.mark.parametrize("name", ["xla", "splash", "reference"])
def test_the_past_and_the_segment_are_all_a_position_sees(name):
  q, k, v, _, _ = operands(1, 160, 2, 2, 16, dtype=np.float32)
  ids = np.repeat(np.int32([[0, 1, 0]]), [50, 70, 40], axis=1)  # id 0 comes back: still one segment
  f = functools.partial(LOCAL.get(name, reference.attention), scale=0.25)
  t = 130
  grads = jax.jit(jax.grad(lambda q, k, v: jnp.abs(f(q, k, v, ids)[:, t]).sum(), argnums=(0, 1, 2)))(q, k, v)
  dq, dk, dv = (np.abs(g[0]).sum(axis=(1, 2)) for g in grads)
  visible = (np.arange(160) <= t) & (ids[0] == ids[0, t])
  assert (dk[~visible] == 0).all()
  assert (dv[~visible] == 0).all()
  assert (dv[visible] > 0).all()
  assert (dq[np.arange(160) != t] == 0).all()
  assert dq[t] > 0


@pytest.mark.parametrize("name", LOCAL)
def test_huge_scores_stay_finite(name):
  q, k, v, ids, ct = operands(1, 128, 2, 2, 16, dtype=np.float32)
  assert all(np.isfinite(x).all() for x in local(name, 16)(1e4 * q, 1e4 * k, v, ids, ct))


@pytest.mark.parametrize("name", LOCAL)
def test_the_same_call_gives_the_same_bits(name):
  args = operands(1, 128, 2, 2, 16, dtype=np.float32)
  f = local(name, 32)
  for a, b in zip(f(*args), f(*args), strict=True):
    np.testing.assert_array_equal(a, b)


def test_one_key_value_head_a_group_is_multi_head_attention_with_repeated_heads():
  q, k, v, ids, _ = operands(2, 60, 6, 2, 16, dtype=np.float32)
  repeated = attention(q, *(np.repeat(x, 3, axis=2) for x in (k, v)), segment_ids=ids)
  np.testing.assert_allclose(attention(q, k, v, segment_ids=ids), repeated, rtol=1e-5, atol=1e-6)


def test_the_default_scale_is_one_over_the_root_of_head_dim():
  q, k, v, ids, _ = operands(1, 9, 2, 2, 16, dtype=np.float32)
  np.testing.assert_array_equal(attention(q, k, v, segment_ids=ids), attention(q, k, v, segment_ids=ids, scale=0.25))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("mesh", [{"data": 4}, {"data": 2, "model": 2}, {"replica": 2, "data": 2}])
def test_a_sharded_call_gives_the_unsharded_result(mesh, implementation):
  *args, ct = operands(4, 70, 8, 4, 16, dtype=np.float32)

  def f(q, k, v, ids, ct):
    call = lambda q, k, v, ids: attention(q, k, v, segment_ids=ids, implementation=implementation)
    return value_and_grads(call, q, k, v, ids, ct)

  alone = jax.jit(f)(*args, ct)
  with jax.set_mesh(make_mesh(MeshConfig(**mesh))):
    heads = jax.P(("replica", "data"), None, "model", None)
    put = lambda x: jax.device_put(x, heads if x.ndim == 4 else jax.P(("replica", "data"), None))
    compiled = jax.jit(lambda *a: f(*a)).lower(*map(put, args), put(ct)).compile()
    together = compiled(*map(put, args), put(ct))
  assert together[0].sharding.spec == heads
  assert not any(word in compiled.as_text() for word in ("all-reduce", "all-gather", "all-to-all"))
  assert max(relative_errors(together, [np.asarray(x) for x in alone])) < 1e-6


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"k": (2, 8, 3, 4), "v": (2, 8, 3, 4)}, "kv_heads=3"),
    ({"v": (2, 8, 2, 5)}, "v="),
    ({"k": (2, 7, 2, 4), "v": (2, 7, 2, 4)}, "k="),
    ({"segment_ids": (2, 7)}, "segment_ids="),
  ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
  shapes = {"q": (2, 8, 4, 4), "k": (2, 8, 2, 4), "v": (2, 8, 2, 4), "segment_ids": (2, 8)} | change
  arrays = {name: np.zeros(shape, np.int32 if name == "segment_ids" else np.float32) for name, shape in shapes.items()}
  with pytest.raises(UserError, match=message):
    attention(**arrays)


def test_heads_that_the_mesh_cannot_cut_are_named():
  q, k, v, _, _ = operands(4, 8, 6, 3, 4, dtype=np.float32)
  with (
    jax.set_mesh(make_mesh(MeshConfig(data=2, model=2))),
    pytest.raises(UserError, match=r"kv_heads=3.*mesh.model=2"),
  ):
    attention(q, k, v)


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_a_kernel_of_another_platform_is_refused_with_the_reason(name):
  q, k, v, _, _ = operands(1, 128, 2, 2, 64, dtype=np.float32)
  with pytest.raises(UserError, match=f"implementation={name}.*needs a .*PU, and this runs on cpu"):
    attention(q, k, v, implementation=name)


def test_every_case_is_one_the_op_takes():
  for case in CASES.values():
    shape = lambda heads: jax.ShapeDtypeStruct((case.batch, case.length, heads, case.head_dim), case.dtype)
    q, kv = shape(case.heads), shape(case.kv_heads)
    assert jax.eval_shape(attention, q, kv, kv) == q
