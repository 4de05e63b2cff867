"""What holds for the decoder of the zoo, with and without a paper's mix of keys and values."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from experiments.kvshift.attention import KVShift
from research.mesh import MeshConfig, to_devices
from research.models.decoder import next_token_loss
from research.models.transformer import Transformer, flops_per_token
from tests import small

MIXES = pytest.mark.parametrize("mix", [None, KVShift], ids=["plain", "kvshift"])


def loss_and_grads(cfg, partition="fsdp_tp", mix=None, batch=None):
  model = jax.jit(lambda key: Transformer(key, cfg, partition, mix))(jax.random.key(1))

  def objective(model, batch):
    mean = next_token_loss(model, batch, jax.random.key(0))["loss"]
    return mean.total / mean.weight

  batch = to_devices(small.batch() if batch is None else batch)
  return jax.block_until_ready(jax.jit(jax.value_and_grad(objective))(model, batch))


def with_table(model, table):
  """The model with another embedding table, to differentiate by it."""
  model = jax.tree.map(lambda x: x, model)
  model.embed[...] = table
  return model


@MIXES
@pytest.mark.parametrize("length", [1, 2, 13])
def test_no_position_sees_a_later_one(mix, length):
  tokens = jnp.arange(length)[None]  # a token of its own for every position: the table's rows tell them apart
  with small.use():
    model = Transformer(jax.random.key(0), small.varied(vocab=length), mix=mix)

    @jax.jit
    def sensitivity(table, t):
      # a sine: no symmetry of the output cancels its gradient
      def output(table):
        hidden = with_table(model, table)(tokens, jnp.ones_like(tokens), tokens)
        return jnp.sum(jnp.where((tokens == t)[..., None], jnp.sin(hidden), 0))

      return jnp.abs(jax.grad(output)(table)).sum(1)

    for t in range(length):
      seen = np.asarray(sensitivity(model.embed[...], t))
      assert (seen[t + 1 :] == 0).all()
      assert (seen[: t + 1] > 0).all()


@MIXES
def test_nothing_leaks_from_one_document_into_another(mix):
  length, cut = 12, 5
  at = jnp.arange(length)
  segments = jnp.where(at < cut, 1, 2)[None]
  batch = {
    "tokens": at[None],
    "targets": at[None] % 7,
    "segment_ids": segments,
    "positions": jnp.where(at < cut, at, at - cut)[None],
  }
  with small.use():
    model = Transformer(jax.random.key(0), small.varied(vocab=length), mix=mix)

    @jax.jit
    def leak(table, document):
      def loss(table):
        weights = (segments == document).astype(jnp.float32)
        return next_token_loss(with_table(model, table), {**batch, "weights": weights}, None)["loss"].total

      return jax.grad(loss)(table)

    for document, own, others in ((1, slice(0, cut), slice(cut, None)), (2, slice(cut, None), slice(0, cut))):
      gradient = np.asarray(leak(model.embed[...], document))
      assert (gradient[others] == 0).all()
      assert (gradient[own] != 0).any(axis=1).all()


@MIXES
def test_packed_documents_are_treated_as_if_alone(mix):
  batch = small.batch(rows=1)
  tokens, segments = batch["tokens"][0], batch["segment_ids"][0]
  with small.use():
    model = Transformer(jax.random.key(0), small.MODEL, mix=mix)
    logits = jax.jit(lambda *x: model.logits(*x))
    packed = logits(batch["tokens"], batch["segment_ids"], batch["positions"])[0]
    for document in (1, 2, 3):
      inside = segments == document
      n = inside.sum()
      alone = np.zeros_like(batch["tokens"])  # the document, then padding, which it cannot see
      alone[0, :n] = tokens[inside]
      out = logits(alone, (np.arange(len(tokens)) < n)[None].astype(np.int32), np.arange(len(tokens))[None])
      np.testing.assert_allclose(out[0, :n], packed[inside], atol=2e-6)


@functools.cache
def on_one_device(mix):
  with small.use():
    return loss_and_grads(small.MODEL, mix=mix)


@pytest.mark.parametrize(
  ("mesh", "mix"),
  [(mesh, None) for mesh in small.MESHES] + [(mesh, KVShift) for mesh in small.MESHES if mesh.model > 1],
  ids=lambda x: f"{x.replica}x{x.data}x{x.model}-{x.partition}" if isinstance(x, MeshConfig) else x and x.__name__,
)
def test_every_partition_gives_the_loss_and_gradients_of_one_device(mesh, mix):
  loss, grads = on_one_device(mix)
  with small.use(mesh, devices=4):
    loss_4, grads_4 = loss_and_grads(small.MODEL, mesh.partition, mix=mix)
  np.testing.assert_allclose(loss_4, loss, rtol=1e-5)
  for a, b in zip(small.leaves(grads), small.leaves(grads_4), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_parameters_stand_where_the_partition_says():
  with small.use(MeshConfig(1, 2, 2), devices=4):
    model = jax.jit(lambda key: Transformer(key, small.MODEL))(jax.random.key(0))
    up = model.blocks.mlp.up[...]
    assert up.sharding.spec == jax.P(None, "data", None, "model")
    assert up.addressable_shards[0].data.size == up.size // 4
    assert model.embed[...].addressable_shards[0].data.size == model.embed[...].size // 4


@pytest.mark.parametrize("change", [{"remat": "full"}, {"remat": "dots"}, {"layer_loop": "unroll"}], ids=str)
def test_remat_and_unrolling_do_not_change_the_gradients(change):
  loss, grads = on_one_device(KVShift)
  with small.use():
    loss_2, grads_2 = loss_and_grads(small.varied(**change), mix=KVShift)
  np.testing.assert_allclose(loss, loss_2, rtol=1e-6)
  for a, b in zip(small.leaves(grads), small.leaves(grads_2), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
  "change",
  [{"qk_norm": True}, {"tie_embeddings": True}, {"kv_heads": 1}, {"kv_heads": 4}, {"precision": "bfloat16"}],
  ids=str,
)
def test_every_option_trains_sharded_as_on_one_device(change):
  cfg = small.varied(**change)
  with small.use():
    loss, _ = loss_and_grads(cfg)
  mesh = MeshConfig(1, 4, 1) if cfg.kv_heads == 1 else MeshConfig(1, 2, 2)
  with small.use(mesh, devices=4):
    sharded, _ = loss_and_grads(cfg)
  np.testing.assert_allclose(loss, sharded, rtol=1e-2 if cfg.precision == "bfloat16" else 1e-5)


def test_parameters_stay_float32_and_products_are_bfloat16():
  with small.use():
    model = Transformer(jax.random.key(0), small.varied(precision="bfloat16"))
    batch = to_devices(small.batch())
    hidden = jax.eval_shape(model, batch["tokens"], batch["segment_ids"], batch["positions"])
    loss, grads = loss_and_grads(small.varied(precision="bfloat16"))
  assert hidden.dtype == jnp.bfloat16
  assert loss.dtype == jnp.float32
  assert {x.dtype for x in small.leaves(model)} == {np.dtype("float32")}
  assert {x.dtype for x in small.leaves(grads)} == {np.dtype("float32")}


def test_rotary_attention_knows_distances_only():
  with small.use():
    model = Transformer(jax.random.key(0), small.MODEL)
    at = jnp.arange(10)[None]
    hidden = jax.jit(lambda positions: model(at, jnp.ones_like(at), positions))
    np.testing.assert_allclose(hidden(at), hidden(at + 1000), atol=2e-4)
    assert np.abs(hidden(at) - hidden(2 * at)).max() > 1e-2


def test_a_mix_leaves_the_shared_weights_as_they_start():
  with small.use():
    plain = Transformer(jax.random.key(3), small.MODEL)
    mixed = Transformer(jax.random.key(3), small.MODEL, mix=KVShift)
  named = lambda m: {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(m)}
  ours, theirs = named(mixed), named(plain)
  assert ours.keys() - theirs.keys() == {".blocks.attention.mix.key.value", ".blocks.attention.mix.value.value"}
  for name, x in theirs.items():
    assert (np.asarray(x) == np.asarray(ours[name])).all()


def test_flops_are_six_per_matrix_parameter_and_token():
  cfg = small.MODEL
  with small.use():
    model = Transformer(jax.random.key(0), cfg)
  matrices = sum(x.size for x in jax.tree.leaves(model)) - model.embed[...].size
  matrices -= sum(n.size for n in jax.tree.leaves((model.norm, model.blocks.attention_norm, model.blocks.mlp_norm)))
  flops = flops_per_token(cfg, 100)
  scores = flops.pop("attention scores")
  assert sum(flops.values()) == 6 * matrices
  assert scores == 3 * cfg.layers * 2 * 2 * cfg.heads * cfg.head_dim * 50.5
