"""KV shifting is what the paper's listing computes, and nothing where its coefficients say nothing."""

import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from experiments.kvshift.attention import KVShift, mix
from research.kernels.attention.api import attention
from research.models.transformer import Transformer
from research.nn import rope
from research.nn.token_shift import shift
from tests import small

GOLDEN = np.load(pathlib.Path(__file__).parent / "goldens" / "kvshift_op.npz")


def operator(q, k, v, K, V, segment_ids, positions, implementation):
  """The whole operator, from the library's own parts."""
  cos, sin = rope.angles(positions, q.shape[-1], 100_000.0)
  cos, sin = cos.astype(q.dtype), sin.astype(q.dtype)
  k, v = mix(k, K, segment_ids), mix(v, V, segment_ids)
  q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
  return attention(q, k, v, segment_ids=segment_ids, implementation=implementation), (k, v, q)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", ["gqa", "mha_trained_alphas", "mqa_T1", "packed"])
def test_values_and_gradients_match_the_reference_code(case, implementation):
  data = {name.split("/", 1)[1]: GOLDEN[name] for name in GOLDEN if name.startswith(case + "/")}
  rows, length = data["q"].shape[:2]
  segments = np.ones((rows, length), np.int32)
  if "segment_ids" in data:
    segments = 1 + np.broadcast_to(data["segment_ids"], (rows, length)).astype(np.int32)
  first = np.array([[np.flatnonzero(row == row[t])[0] for t in range(length)] for row in segments])
  positions = (np.arange(length) - first).astype(np.int32)
  inputs = [jnp.asarray(data[name]) for name in "qkvKV"]

  def objective(*inputs):
    out, parts = operator(*inputs, segments, positions, implementation)
    return jnp.sum(out * data["dout"]), (out, parts)

  gradients, (out, (k_rot, v_shifted, q_rot)) = jax.jit(jax.grad(objective, argnums=range(5), has_aux=True))(*inputs)
  np.testing.assert_allclose(v_shifted, data["v_shifted"], atol=1e-6)
  np.testing.assert_allclose(k_rot, data["k_rot"], atol=1e-5)
  np.testing.assert_allclose(q_rot, data["q_rot"], atol=1e-5)
  np.testing.assert_allclose(out, data["out"], atol=2e-5)
  for name, gradient in zip("qkvKV", gradients, strict=True):
    np.testing.assert_allclose(gradient, data[f"grad_{name}"], atol=5e-5, err_msg=name)


def test_the_operator_matches_in_float64_to_ten_digits():
  data = {name.split("/", 1)[1]: GOLDEN[name] for name in GOLDEN if name.startswith("gqa/")}
  with jax.enable_x64(True):
    q, k, v, K, V = (jnp.asarray(data[name], jnp.float64) for name in "qkvKV")
    k, v = mix(k, K, None), mix(v, V, None)
    np.testing.assert_allclose(k, data["k_shifted"], atol=1e-10)
    q, k = (jnp.asarray(data[name]) for name in ("q_rot", "k_rot"))
    np.testing.assert_allclose(attention(q, k, v, implementation="reference"), data["out"], atol=1e-10)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_identity_coefficients_are_plain_attention_bit_for_bit(precision):
  cfg = small.varied(precision=precision)
  batch = small.batch()
  inputs = [batch[name] for name in ("tokens", "segment_ids", "positions")]
  with small.use():
    plain = Transformer(jax.random.key(0), cfg)
    shifted = Transformer(jax.random.key(0), cfg, mix=KVShift)
    for parameter in (shifted.blocks.attention.mix.key, shifted.blocks.attention.mix.value):
      parameter[...] = jnp.zeros_like(parameter[...]).at[..., 1].set(1)
    logits = [np.asarray(jax.jit(lambda m: m.logits(*inputs))(model)) for model in (plain, shifted)]
  assert (logits[0] == logits[1]).all()


def test_coefficients_start_uniform_and_sum_to_one_for_each_head_on_its_own():
  with small.use():
    cfg = small.varied(kv_heads=64, heads=64, layers=8)
    mixes = jax.jit(lambda key: Transformer(key, cfg, mix=KVShift).blocks.attention.mix)(jax.random.key(0))
  both = [np.asarray(p[...]) for p in (mixes.key, mixes.value)]
  for c in both:
    assert c.shape == (8, 64, 2)
    np.testing.assert_allclose(c.sum(-1), 1, atol=1e-6)
    assert 0 <= c.min() < 0.01
    assert 0.99 < c.max() <= 1
    assert abs(c[..., 1].mean() - 0.5) < 0.05
    assert len(np.unique(c[..., 1])) == 8 * 64
  assert (both[0] != both[1]).all()


def test_the_shift_starts_anew_at_rows_and_documents_even_beside_nan():
  x = jnp.array([[1.0, jnp.nan, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])[..., None]
  segments = jnp.array([[1, 1, 2, 2], [1, 2, 3, 3]])
  np.testing.assert_array_equal(shift(x, segments)[..., 0], [[0, 1, 0, 3], [0, 0, 0, 7]])
  np.testing.assert_array_equal(shift(x)[1, :, 0], [0, 5, 6, 7])
  assert shift(x[:, :1], segments[:, :1]).shape == (2, 1, 1)


def test_the_shift_adds_four_numbers_a_head():
  with small.use():
    plain, shifted = (Transformer(jax.random.key(0), small.MODEL, mix=m) for m in (None, KVShift))
  size = lambda model: sum(x.size for x in jax.tree.leaves(model))
  assert size(shifted) - size(plain) == 4 * small.MODEL.kv_heads * small.MODEL.layers
