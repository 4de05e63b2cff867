"""VAR has the released code's numbers, at once and scale by scale, on one device and on several."""

import dataclasses
import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.mesh import to_devices
from research.models import convert, var
from research.models.decoder import log_likelihood
from research.models.var import SIZES, VAR, VARConfig, official
from tests import small
from tests.models.images import check_gradients, check_traced_gradients, expected, load, manifest, traced

CASES = pytest.mark.parametrize("name", ["var_l2norm", "var_saln_nol2norm"])
MODEL = VARConfig(
  vocab=32, code_width=8, classes=6, scales=(1, 2, 3), width=32, layers=2, heads=4, mlp_width=64, drop_path=0.5,
  gamma=0.5, precision="float32", layer_loop="scan",
)  # fmt: skip


def varied(**changes):
  return dataclasses.replace(MODEL, **changes)


def batch(rows=8, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "tokens": rng.integers(MODEL.vocab, size=(rows, 14)).astype(np.int32),
    "labels": rng.integers(MODEL.classes + 1, size=rows).astype(np.int32),
    "inputs": rng.normal(size=(rows, 13, 8)).astype(np.float32),
  }


def random_model(cfg=MODEL, partition="fsdp_tp"):
  model = jax.jit(lambda key: VAR(key, cfg, partition))(jax.random.key(1))
  model.head[...] = model.head[...] * 50  # it starts near zero
  return model


def loss_and_grads(model, batch, key=None):
  def objective(model, batch):
    mean = var.loss(model, batch, key)["loss"]
    return mean.total / mean.weight

  return jax.block_until_ready(jax.jit(jax.value_and_grad(objective))(model, to_devices(batch)))


@CASES
def test_logits_and_likelihoods_are_the_released_codes(name):
  wanted = expected(name)
  inputs, labels = wanted["x_BLCv_wo_first_l"], wanted["label_B"]
  with small.use():
    model = load(name, layer_loop="unroll")

    @jax.jit
    def run(model, labels):
      classes, condition = model._condition(labels)
      x = jnp.concatenate([model._first(classes), model._later(inputs, 1)], axis=1)
      levels = model.cfg.levels
      first = jax.tree.map(lambda x: x[0], model.blocks)(x, condition, levels[:, None] >= levels)[0]
      return classes, condition, x, first, model.logits(inputs, labels)

    classes, condition, embedded, first, logits = run(model, labels)
    null = run(model, np.full_like(labels, model.cfg.classes))[-1]
  wanted_condition = wanted["cond_BD_or_gss"]
  np.testing.assert_allclose(np.reshape(condition, wanted_condition.shape), wanted_condition, atol=1e-4)
  np.testing.assert_allclose(embedded, wanted["embed_out_BLC"], atol=1e-4)
  np.testing.assert_allclose(first, wanted["block0_out"], atol=1e-4)
  np.testing.assert_allclose(logits, wanted["logits_cond"], atol=1e-4)
  np.testing.assert_allclose(null, wanted["logits_null_class"], atol=1e-4)
  likelihoods = log_likelihood(logits, wanted["gt_BL"])
  np.testing.assert_allclose(likelihoods, wanted["logp_cond"], atol=1e-4)
  np.testing.assert_allclose(likelihoods.sum(1), wanted["logp_cond_sum"], atol=5e-4)


@CASES
def test_the_loss_and_its_gradients_are_the_released_codes(name):
  wanted = expected(name)
  data = {"tokens": wanted["gt_BL"], "inputs": wanted["x_BLCv_wo_first_l"], "labels": wanted["label_B"]}
  with small.use():
    loss, grads = loss_and_grads(load(name), data)
  np.testing.assert_allclose(loss, wanted["train_ce_loss_mean"], rtol=1e-5)
  check_gradients(grads, name, wanted, "grad_ce")


# Official sizes


@pytest.mark.parametrize("size", SIZES)
def test_official_sizes_have_the_released_number_of_parameters(size):
  wanted = next(x for name, x in manifest("var").items() if size.removesuffix("-s") in name)
  cfg = official(size)
  model, count = traced(lambda key: VAR(key, cfg), model=2)
  assert count == wanted["n_params"]
  tensors, buffers = convert.var.tensors(cfg), convert.var.buffers(cfg)
  assert len(tensors) + len(buffers) == wanted["n_keys"]
  shapes = {key: list(x.shape) for key, x in (tensors | buffers).items()}
  assert {key: shapes[key] for key in wanted["state_dict"]} == wanted["state_dict"]
  assert {t.param for t in tensors.values()} == {
    convert._name(path) for path, _ in jax.tree_util.tree_leaves_with_path(model)
  }


@pytest.mark.parametrize("size", ["d16", "d36-s"])
def test_the_full_size_gradient_traces_on_an_abstract_pod(size):
  cfg = official(size, remat="full", layer_loop="scan")
  cfg.check_mesh({"replica": 1, "data": 16, "model": 4}, "fsdp_tp")
  shapes = {"tokens": (64, cfg.tokens), "labels": (64,), "inputs": (64, cfg.tokens - 1, 32)}
  check_traced_gradients(lambda key: VAR(key, cfg), var.loss, shapes)


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


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_scale_by_scale_gets_the_logits_of_the_whole_and_sees_no_finer_scale(shared):
  data = batch(4)
  with small.use():
    model = random_model(varied(shared_adaln=shared, qk_norm=not shared))
    logits = jax.jit(lambda inputs: model.logits(inputs, data["labels"]))
    whole = logits(data["inputs"])

    @jax.jit
    def cached(model, inputs):
      x, cache = model.begin(data["labels"])
      out = [x]
      for start, stop in ((0, 4), (4, 13)):
        x, cache = model.extend(inputs[:, start:stop], data["labels"], cache)
        out.append(x)
      return model.unembed(jnp.concatenate(out, axis=1))

    np.testing.assert_allclose(cached(model, data["inputs"]), whole, atol=1e-5)
    if not shared:
      changed = data["inputs"].copy()
      changed[:, 3] += 1  # the last cell of the second scale
      moved = (np.abs(logits(changed) - whole) > 1e-6).any((0, 2))
      np.testing.assert_array_equal(moved, np.arange(14) >= 1)
      changed = data["inputs"].copy()
      changed[:, 4] += 1  # the first cell of the third
      np.testing.assert_array_equal((np.abs(logits(changed) - whole) > 1e-6).any((0, 2)), np.arange(14) >= 5)


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_flops_are_six_per_matrix_parameter_and_token_and_those_of_the_class_once_an_image(shared):
  cfg = varied(shared_adaln=shared)
  with small.use():
    model = jax.eval_shape(lambda: VAR(jax.random.key(0), cfg))
  held = {convert._name(path): x.size for path, x in jax.tree_util.tree_leaves_with_path(model)}
  matrices = {name: n for name, n in held.items() if not name.endswith("bias")}
  modulation = sum(n for name, n in matrices.items() if name.endswith("weight"))
  used = ("attention.qkv", "attention.out", "mlp.up", "mlp.down", "head", "word")
  flops = var.flops_per_token(cfg)
  np.testing.assert_allclose(flops.pop("modulation"), 6 * modulation / 14)
  assert flops.pop("attention scores") == 3 * cfg.layers * 2 * 2 * cfg.width * (1 * 1 + 4 * 5 + 9 * 14) / 14
  assert sum(flops.values()) == 6 * sum(n for name, n in matrices.items() if name.endswith(used))


@pytest.mark.parametrize(
  ("make", "told"),
  [
    (lambda: varied(width=30), "width=30: must be a multiple of heads=4"),
    (lambda: varied(scales=(2,)), "scales="),
    (lambda: varied(drop_path=1), "drop_path=1"),
    (lambda: official("d12"), "size=d12: choose from d16"),
  ],
)
def test_sizes_that_do_not_fit_are_told_in_one_line(make, told):
  with pytest.raises(UserError, match=told):
    make()
