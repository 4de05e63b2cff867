"""LlamaGen has the released code's numbers, in every form it was saved, on one device and on several."""

import dataclasses
import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.mesh import to_devices
from research.models import convert, llamagen
from research.models.decoder import log_likelihood
from research.models.llamagen import SIZES, LlamaGen, LlamaGenConfig, official
from research.nn import rope
from research.nn.dropout import drop_labels, drop_path, dropout
from tests import small
from tests.models.images import check_gradients, check_traced_gradients, expected, load, manifest, traced

CASES = pytest.mark.parametrize("name", ["llamagen_gpt_mha", "llamagen_gpt_gqa"])
MODEL = LlamaGenConfig(
  vocab=32, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48, classes=6, tokens=16,
  precision="float32", layer_loop="scan",
)  # fmt: skip


def varied(**changes):
  return dataclasses.replace(MODEL, **changes)


def batch(rows=8, seed=0):
  rng = np.random.default_rng(seed)
  tokens, labels = rng.integers(MODEL.vocab, size=(rows, MODEL.tokens)), rng.integers(MODEL.classes + 1, size=rows)
  return {"tokens": tokens.astype(np.int32), "labels": labels.astype(np.int32)}


def random_model(cfg=MODEL, partition="fsdp_tp", seed=1):
  model = jax.jit(lambda key: LlamaGen(key, cfg, partition))(jax.random.key(seed))
  head = model.decoder.head[...]  # else zero
  model.decoder.head[...] = jax.device_put(jax.random.normal(jax.random.key(2), head.shape), head.sharding) / 8
  return model


def loss_and_grads(model, batch, key=None):
  def objective(model, batch):
    mean = llamagen.loss(model, batch, key)["loss"]
    return mean.total / mean.weight

  return jax.block_until_ready(jax.jit(jax.value_and_grad(objective))(model, to_devices(batch)))


# Parity with the released code


@CASES
def test_logits_and_likelihoods_are_the_released_codes(name):
  wanted = expected(name)
  tokens, labels = wanted["tokens"], wanted["class_ids"]
  with small.use():
    model = load(name)
    logits = jax.jit(lambda model, *x: model.logits(*x))
    out = logits(model, tokens, labels)
    null = logits(model, tokens, np.full_like(labels, model.cfg.classes))
  np.testing.assert_allclose(out, wanted["logits_cond"], atol=1e-4)
  np.testing.assert_allclose(null, wanted["logits_uncond"], atol=1e-4)
  np.testing.assert_allclose(null + 2 * (out - null), wanted["logits_cfg_2"], atol=5e-4)
  likelihoods = log_likelihood(out, tokens)
  np.testing.assert_allclose(likelihoods, wanted["logp_cond"], atol=1e-4)
  np.testing.assert_allclose(log_likelihood(null, tokens), wanted["logp_uncond"], atol=1e-4)
  np.testing.assert_allclose(likelihoods.sum(1), wanted["logp_cond_sum"], atol=5e-4)


@CASES
def test_the_first_block_computes_what_the_released_code_computes(name):
  wanted = expected(name)
  tokens, labels = wanted["tokens"], wanted["class_ids"]
  with small.use():
    model = load(name)
    x = jnp.concatenate([model._embed_class(labels), model.decoder.lookup(tokens[:, :-1])], axis=1)
    np.testing.assert_array_equal(x, wanted["embed_out"])
    block = jax.tree.map(lambda x: x[0], model.decoder.blocks)
    out = jax.jit(lambda block, x: block(x, *llamagen._rows(len(x), 0, 16)))(block, x)
    np.testing.assert_allclose(out, wanted["block0_out"], atol=1e-4)


@CASES
def test_the_loss_and_its_gradients_are_the_released_codes(name):
  wanted = expected(name)
  with small.use():
    model = load(name)
    loss, grads = loss_and_grads(model, {"tokens": wanted["tokens"], "labels": wanted["class_ids"]})
    logits = jax.jit(lambda model, *x: model.logits(*x))(model, wanted["tokens"], wanted["class_ids"])
  np.testing.assert_allclose(loss, wanted["train_ce_loss"], rtol=1e-5)
  check_gradients(grads, name, wanted, "grad_ce")
  if "valid_mask" in wanted:
    valid = np.broadcast_to(wanted["valid_mask"][:, None], wanted["tokens"].shape)
    masked = -(log_likelihood(logits, wanted["tokens"]) * valid).sum() / valid.sum()
    np.testing.assert_allclose(masked, wanted["train_ce_loss_valid_masked"], rtol=1e-5)


@CASES
def test_rotary_angles_of_the_grid_are_the_released_codes(name):
  table = expected(name)["freqs_cis"]
  positions = np.arange(len(table), dtype=np.int32)[None]
  cos, sin = rope.grid_angles(positions, 2 * table.shape[1], 10000.0, 4)
  np.testing.assert_allclose(cos[0, :, 0], table[..., 0], atol=1e-6)
  np.testing.assert_allclose(sin[0, :, 0], table[..., 1], atol=1e-6)


# Official sizes


@pytest.mark.parametrize("size", SIZES)
def test_official_sizes_have_the_released_number_of_parameters(size):
  wanted = manifest("llamagen")[f"GPT-{size}_block576"]
  cfg = official(size, tokens=576)
  model, count = traced(lambda key: LlamaGen(key, cfg))
  assert count == wanted["n_params"]
  tensors = convert.llamagen.tensors(cfg)
  assert len(tensors) == wanted["n_keys"]
  assert {key: list(tensors[key].shape) for key in wanted["state_dict"]} == wanted["state_dict"]
  assert (cfg.head_dim, cfg.mlp_width) == (wanted["head_dim"], wanted["ffn_hidden"])
  held = {convert._name(path) for path, _ in jax.tree_util.tree_leaves_with_path(model)}
  assert {tensor.param for tensor in tensors.values()} == held


@pytest.mark.parametrize("size", SIZES)
def test_the_full_size_gradient_traces_on_an_abstract_pod(size):
  cfg = official(size, tokens=576, remat="full", layer_loop="scan")
  cfg.check_mesh({"replica": 1, "data": 16, "model": 4}, "fsdp_tp")
  check_traced_gradients(lambda key: LlamaGen(key, cfg), llamagen.loss, {"tokens": (64, 576), "labels": (64,)})


# Execution


@functools.cache
def on_one_device():
  with small.use():
    return loss_and_grads(random_model(), batch(), jax.random.key(5))


def same(ours, reference, rtol):
  for a, b in zip(small.leaves(ours), small.leaves(reference), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize(
  "mesh", [small.MESHES[4], *(pytest.param(m, marks=pytest.mark.slow) for m in small.MESHES[:4])], ids=str
)
def test_every_partition_gives_the_loss_and_gradients_of_one_device_with_its_dropout(mesh):
  with small.use(mesh, devices=4):
    same(loss_and_grads(random_model(MODEL, mesh.partition), batch(), jax.random.key(5)), on_one_device(), 1e-4)


@pytest.mark.parametrize(
  "change",
  [
    {"remat": "full"},
    *(pytest.param(c, marks=pytest.mark.slow) for c in ({"remat": "dots"}, {"layer_loop": "unroll"})),
  ],
)
def test_remat_and_unrolling_do_not_change_the_gradients(change):
  with small.use():
    same(loss_and_grads(random_model(varied(**change)), batch(), jax.random.key(5)), on_one_device(), 1e-5)


def test_dropout_acts_in_training_only():
  data = batch()
  with small.use():
    model = random_model()
    logits = jax.jit(lambda model, key: model.logits(data["tokens"], data["labels"], key))
    plain, dropped = logits(model, None), logits(model, jax.random.key(0))
    assert np.abs(dropped - plain).max() > 1e-2
    assert np.abs(dropped - logits(model, jax.random.key(1))).max() > 1e-2
    np.testing.assert_array_equal(dropped, logits(model, jax.random.key(0)))


def test_dropout_keeps_the_mean_and_drops_what_it_says():
  x = jnp.full((64, 8, 16), 3.0)
  kept = np.asarray(dropout(jax.random.key(0), x, 0.25))
  assert set(np.unique(kept)) == {0.0, 4.0}
  np.testing.assert_allclose((kept == 0).mean(), 0.25, atol=0.02)
  rows = np.asarray(drop_path(jax.random.key(0), x, 0.5)).reshape(64, -1)
  assert (rows == rows[:, :1]).all()
  assert set(np.unique(rows)) == {0.0, 6.0}
  labels = np.asarray(drop_labels(jax.random.key(1), jnp.arange(1000) % 10, 0.1, 10))
  np.testing.assert_allclose((labels == 10).mean(), 0.1, atol=0.03)
  assert (labels == np.arange(1000) % 10)[labels != 10].all()


def test_no_token_sees_itself_or_a_later_one_and_all_see_the_class():
  data = batch(1)
  with small.use():
    model = random_model()
    logits = jax.jit(lambda tokens, labels: model.logits(tokens, labels))
    plain = logits(data["tokens"], data["labels"])
    for t in (0, 7, 15):
      changed = data["tokens"].copy()
      changed[0, t] = (changed[0, t] + 1) % MODEL.vocab
      moved = np.abs(logits(changed, data["labels"]) - plain)[0].max(-1) > 1e-6
      np.testing.assert_array_equal(moved, np.arange(16) > t)
    assert (np.abs(logits(data["tokens"], (data["labels"] + 1) % 7) - plain)[0].max(-1) > 1e-6).all()


def test_an_untrained_model_finds_all_tokens_equally_likely():
  with small.use():
    model = LlamaGen(jax.random.key(0), MODEL)
    loss, _ = loss_and_grads(model, batch())
  np.testing.assert_allclose(loss, np.log(MODEL.vocab), rtol=1e-6)


def test_tokens_step_by_step_get_the_logits_of_the_whole():
  data = batch(4)
  with small.use():
    model = random_model()
    tokens, labels = data["tokens"], data["labels"]
    whole = jax.jit(lambda model, *x: model.logits(*x))(model, tokens, labels)
    extend = jax.jit(lambda model, tokens, cache: model.extend(tokens, cache))
    x, cache = jax.jit(lambda model, labels: model.begin(labels))(model, labels)
    out, at = [x], 0
    for n in (5, 5, 5):
      x, cache = extend(model, tokens[:, at : at + n], cache)
      out.append(x)
      at += n
    np.testing.assert_allclose(model.unembed(jnp.concatenate(out, axis=1)), whole, atol=1e-5)


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    ({"tokens": 15}, "tokens=15: must be a square"),
    ({"head_dim": 6}, "head_dim=6: must be a multiple of 4"),
    ({"classes": 0}, "classes=0"),
    ({"mlp_dropout": 1.0}, "mlp_dropout=1.0: must lie in"),
  ],
)
def test_sizes_that_do_not_fit_are_told_in_one_line(changes, told):
  with pytest.raises(UserError, match=told.replace("[", r"\[")):
    varied(**changes)
  with pytest.raises(UserError, match="size=7B: choose from B, L"):
    official("7B")
