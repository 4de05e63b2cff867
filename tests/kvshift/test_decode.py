"""Every attention of the experiment says the same token by token as at once."""

import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from experiments.kvshift.attention import KVShift
from experiments.kvshift.experiment import ATTENTIONS
from research.mesh import PARTITIONS, MeshConfig
from research.models import convert
from research.models.transformer import Transformer
from research.nn.attention import Attention, empty_cache
from research.nn.precision import POLICIES
from research.nn.rope import RopeScaling
from tests import small

OPERATOR = np.load(pathlib.Path(__file__).parent / "goldens" / "kvshift_op.npz")
GOLDENS = pathlib.Path(__file__).parents[1] / "models" / "goldens"


def in_chunks(model, batch, chunks, **kwargs):
  """Final hidden states, the row read in chunks of these lengths: prefill, then one `extend` after another."""
  names = ("tokens", "segment_ids", "positions")
  length = sum(chunks)
  prefill = jax.jit(lambda model, *row: model.prefill(*row, length + 3))
  extend = jax.jit(lambda model, cache, *row: model.extend(*row, cache))
  out, start, cache = [], 0, None
  for chunk in chunks:
    row = [jnp.asarray(batch[name][:, start : start + chunk]) for name in names]
    x, cache = prefill(model, *row) if cache is None else extend(model, cache, *row)
    out.append(np.asarray(x))
    start += chunk
  return np.concatenate(out, axis=1)


@pytest.mark.parametrize(("attention", "layer_loop"), [("kvshift", "unroll"), *((name, "scan") for name in ATTENTIONS)])
def test_steps_and_appended_chunks_equal_the_whole_row(attention, layer_loop):
  cfg = small.varied(layer_loop=layer_loop, qk_norm=layer_loop == "scan")
  batch = small.batch(rows=4)  # with documents that end inside
  with small.use():
    model = Transformer(jax.random.key(1), cfg, mix=ATTENTIONS[attention])
    whole = np.asarray(model(batch["tokens"], batch["segment_ids"], batch["positions"]))
    chunks = (7, 1, 1, 1, 1, 2, 2, 1, 8)
    np.testing.assert_allclose(in_chunks(model, batch, chunks), whole, atol=1e-5)


def test_prompts_padded_on_their_left_say_what_they_say_alone():
  lengths, total = (24, 10, 1), 24
  tokens = small.batch(rows=3)["tokens"]
  at = np.arange(total) - (total - np.array(lengths)[:, None])
  batch = {"tokens": tokens, "segment_ids": (at >= 0).astype(np.int32), "positions": np.maximum(at, 0).astype(np.int32)}
  with small.use():
    model = Transformer(jax.random.key(1), small.MODEL, mix=KVShift)
    padded = in_chunks(model, batch, (16, *(1,) * 8))
    for i, length in enumerate(lengths):
      row = tokens[i : i + 1, total - length :]
      alone = model(row, np.ones_like(row), np.arange(length, dtype=np.int32)[None])
      np.testing.assert_allclose(padded[i, total - length :], alone[0], atol=1e-5)


def test_step_logits_are_those_of_the_reference_code():
  golden = np.load(GOLDENS / "kvshift" / "expected.npz")
  ids = golden["generated_ids"].astype(np.int32)
  batch = {
    "tokens": ids,
    "segment_ids": np.ones_like(ids),
    "positions": np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape),
  }
  with small.use():
    _, model = convert.load(GOLDENS / "kvshift", precision="float32")
    logits = np.asarray(model.unembed(jnp.asarray(in_chunks(model, batch, (7, *(1,) * 24)))))
  np.testing.assert_allclose(logits[:, 6:-1], golden["generated_step_logits"], atol=1e-4)


@pytest.mark.parametrize("mesh", [MeshConfig(1, 2, 2, "fsdp_tp"), MeshConfig(2, 2, 1, "fsdp")], ids=str)
def test_a_sharded_model_decodes_as_one_device_does(mesh):
  batch, chunks = small.batch(rows=4), (7, 1, 1, 15)
  with small.use():
    expected = in_chunks(Transformer(jax.random.key(1), small.MODEL, mix=KVShift), batch, chunks)
  with small.use(mesh, devices=4):
    model = Transformer(jax.random.key(1), small.MODEL, mesh.partition, mix=KVShift)
    np.testing.assert_allclose(in_chunks(model, batch, chunks), expected, atol=1e-5)


@pytest.mark.parametrize("case", ["gqa", pytest.param("mha_trained_alphas", marks=pytest.mark.slow)])
def test_the_token_after_the_prefill_is_mixed_with_raw_rows_unlike_in_the_papers_listing(case):
  """The listing keeps the mixed key and value at prefill; the golden's trap is what follows from that."""
  data = {name.split("/", 1)[1]: OPERATOR[name] for name in OPERATOR if name.startswith(case + "/")}
  q, k, v = (jnp.asarray(data[name], jnp.float32) for name in "qkv")
  (batch, length, heads, head_dim), kv_heads = q.shape, k.shape[2]
  with small.use():
    layer = identity_layer(heads, kv_heads, head_dim)
    layer.mix.key[...], layer.mix.value[...] = (jnp.asarray(data[name], jnp.float32) for name in "KV")
    x = jnp.concatenate([q.reshape(batch, length, kv_heads, -1), k, v], axis=-1).reshape(batch, length, -1)
    cache = empty_cache(layer.mix, 1, batch, length, heads, kv_heads, head_dim, jnp.float32)
    out, start = [], 0
    for chunk in (length - 1, 1):
      ids = jnp.ones((batch, chunk), jnp.int32)
      positions = jnp.broadcast_to(start + jnp.arange(chunk), (batch, chunk))
      y, cache = layer.extend(x[:, start : start + chunk], ids, positions, cache.begin(ids), 0, fresh=start == 0)
      cache = cache.end(ids)
      out.append(y)
      start += chunk
  y = np.concatenate(out, axis=1)[..., : heads * head_dim].reshape(q.shape)
  np.testing.assert_allclose(y, data["out"], atol=2e-5)
  trap = data["trap_out_last_token_if_postconv_state"]
  assert np.abs(y[:, -1] - trap).max() > 0.02


def identity_layer(heads, kv_heads, head_dim):
  """An attention layer whose raw q, k and v are its input, cut up, and whose output is that of the heads."""
  group = heads // kv_heads
  width = kv_heads * (group + 2) * head_dim
  model = small.varied(width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
  layer = Attention(
    jax.random.key(0),
    width=width,
    heads=heads,
    kv_heads=kv_heads,
    head_dim=head_dim,
    rope_base=100_000.0,
    rope_scaling=RopeScaling(),
    out_scale=1.0,
    qk_norm_eps=None,
    partition=PARTITIONS["replicated"](),
    policy=POLICIES["float32"],
    mix=KVShift(jax.random.key(0), model, PARTITIONS["replicated"]()),
  )
  layer.qkv[...] = jnp.eye(width).reshape(layer.qkv.shape)
  layer.out[...] = jnp.eye(heads * head_dim, width).reshape(layer.out.shape)
  return layer
