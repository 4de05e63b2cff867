"""Tuning: the released code's numbers from weights to gradients, the same on several devices, and where it begins."""

import dataclasses
import functools
import json
import math
import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from experiments.cca import losses, tuning
from experiments.cca.tuning import TuningConfig
from research.errors import UserError
from research.evals.image_likelihood import log_likelihoods
from research.mesh import MeshConfig, on_devices, to_devices
from research.models import convert
from research.models.decoder import log_likelihood
from research.models.llamagen import LlamaGen, LlamaGenConfig
from research.models.var import VAR, VARConfig
from tests import small
from tests.models import images

GOLDENS = pathlib.Path(__file__).parent / "goldens"
GPT = LlamaGenConfig(
  vocab=16, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp_width=16, classes=5, tokens=16,
  precision="float32", class_dropout=0.0,
)  # fmt: skip
NEXT_SCALE = VARConfig(
  vocab=16, code_width=4, classes=5, scales=(1, 2, 3), width=16, layers=1, heads=2, mlp_width=16, gamma=0.5,
  precision="float32", class_dropout=0.0,
)  # fmt: skip
KEY = jax.random.key(3)
CCA = TuningConfig(beta=0.1, lam=3.0, uncond=0.4)


def make(cfg=GPT, seed=1, partition="fsdp_tp"):
  """A model of random parameters under the current mesh, without the compile that its own would take."""
  kind = LlamaGen if isinstance(cfg, LlamaGenConfig) else VAR
  model = on_devices(jax.eval_shape(lambda: kind(jax.random.key(0), cfg, partition)))
  rng = np.random.default_rng(seed)
  numbers = lambda x: (rng.normal(size=x.shape) * x.shape[0] ** -0.5).astype(x.dtype)
  return jax.tree.map(lambda x: jax.device_put(numbers(x), x.sharding), model)


def rows(cfg=GPT, tune=None, count=8, **options):
  rng, out = np.random.default_rng(0), {}
  for name, x in tuning.batch_shapes(tune or TuningConfig(), cfg, count, **options).items():
    of = {"weights": lambda: np.ones(count), "labels": lambda: np.array([0, 1, 1, 2, 3, 0, 4, 2] * count)[:count]}
    numbers = rng.normal(size=x.shape) if x.dtype == jnp.float32 else rng.integers(16, size=x.shape)
    out[name] = of.get(name, lambda numbers=numbers: numbers)().astype(x.dtype)
  return out


def values(means):
  return {name: float(mean.value) for name, mean in means.items()}


@functools.partial(jax.jit, static_argnames="cfg")
def grads_of(model, reference, batch, key, cfg):
  def objective(model, reference):
    means = tuning.loss(model, batch, key, reference, cfg=cfg)
    return means["loss"].value, means

  return jax.grad(objective, (0,) if reference is None else (0, 1), has_aux=True)(model, reference)


def run(tune, model, batch, reference=None, key=KEY):
  """The metrics, and the gradients by the model and its reference."""
  grads, means = jax.block_until_ready(grads_of(model, reference, to_devices(batch), key, tune))
  return values(means), grads


def run_forward(tune, model, batch, reference, key=KEY):
  return values(jax.block_until_ready(tuning._metrics(model, to_devices(batch), key, reference, cfg=tune)))


# Parity with the released code, from weights to gradients


def golden(name, setting):
  """(settings, arrays, policy, reference) of a recorded run."""
  about = json.loads((GOLDENS / "settings.json").read_text())[name][setting]
  made = json.loads((GOLDENS / name / "config.json").read_text())
  path = lambda who: convert.read(GOLDENS / name / f"{who}.safetensors", made)
  return about, np.load(GOLDENS / name / "expected.npz"), path("policy"), path("reference")


def key_that_drops(wanted, share):
  """The released code's random numbers are others: a key under which the same rows lose their class."""
  drops = lambda seed: tuning._null(
    jax.random.split(jax.random.key(seed), 4)[0], TuningConfig(uncond=share), len(wanted)
  )
  return jax.random.key(next(seed for seed in range(1000) if np.array_equal(drops(seed), wanted)))


@pytest.mark.parametrize(
  ("name", "setting"),
  [
    ("cca_llamagen_e2e", "A"),
    pytest.param("cca_llamagen_e2e", "B", marks=pytest.mark.slow),
    ("cca_var_e2e", "A"),
    pytest.param("cca_var_e2e", "B", marks=pytest.mark.slow),
    pytest.param("cca_var_e2e", "C_uncond0", marks=pytest.mark.slow),
  ],
)
def test_the_loss_and_its_gradients_by_weights_are_the_released_codes(name, setting):
  about, wanted, policy, reference = golden(name, setting)
  share = about["uncond_ratio"]
  tune = TuningConfig("cca", about["beta"], about["lambda_"], uncond=share, masked=share > 0)
  batch = {"labels": wanted["labels"], "weights": np.ones(6, np.float32)}
  with small.use():
    (cfg, model), (_, start) = (
      convert.load(x, precision="float32", class_dropout=0.0, layer_loop="scan") for x in (policy, reference)
    )
    if name == "cca_var_e2e":
      batch |= {"codes": wanted["gt_BL"], "inputs": wanted["x_BLCv_wo_first_l"]}
    else:
      batch["codes"] = wanted["z_indices"]
    key = key_that_drops(wanted[f"{setting}/TBM"], share) if share else KEY
    means, (grads, _) = run(tune, model, batch, start, key)
  np.testing.assert_allclose(means["loss"], wanted[f"{setting}/loss"], rtol=1e-5, atol=1e-6)
  gap = lambda of: wanted[f"{setting}/{of}img_logps"] - wanted[f"{setting}/{of}img_ref_logps"]
  null = wanted[f"{setting}/TBM"] if share else np.zeros(6, bool)
  differ = ~null & (wanted["labels"] != np.roll(wanted["labels"], -1))
  pos, neg = gap(""), gap("negative_")
  np.testing.assert_allclose(means["reward_pos"], pos[~null].mean(), atol=5e-4)
  np.testing.assert_allclose(means["reward_neg"], neg[differ].mean(), atol=5e-4)
  np.testing.assert_allclose(means["margin"], (pos - neg)[differ].mean(), atol=5e-4)
  assert means["reward_accuracy"] == pytest.approx((pos > neg)[differ].mean())
  np.testing.assert_allclose(
    means["ce"], -wanted[f"{setting}/img_logps"][~null].mean() / batch["codes"].shape[1], atol=1e-4
  )
  np.testing.assert_allclose(optax.tree.norm(grads), about["grad_global_norm"], rtol=1e-4)
  ours = {convert._name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(grads)}
  keys = [k for k in wanted if k.startswith(f"{setting}/grad/")]
  assert len(keys) == 4
  for k in keys:
    tensor = policy.tensors[k.removeprefix(f"{setting}/grad/")]
    atol = 1e-4 * np.abs(wanted[k]).max()
    np.testing.assert_allclose(tensor.as_file(ours[tensor.param]), wanted[k], rtol=0, atol=atol, err_msg=k)


@pytest.mark.slow
def test_what_var_is_tuned_on_is_made_of_images_as_the_released_code_makes_it():
  _, wanted, _, _ = golden("cca_var_e2e", "A")
  with small.use():
    tokenizer = images.load("var_vqvae")
    codes = jax.jit(lambda tokenizer, x: tokenizer.encode(x))(tokenizer, np.moveaxis(wanted["image"], 1, 3))
    np.testing.assert_array_equal(codes, wanted["gt_BL"])
    inputs = jax.jit(lambda tokenizer, x: tokenizer.inputs(x))(tokenizer, codes)
  np.testing.assert_allclose(inputs, wanted["x_BLCv_wo_first_l"], atol=1e-4)


# The loss by hand, from likelihoods of one image under one class at a time


@functools.cache
def table():
  """(batch, log p, log p of the reference) of every image under every class and the null class."""
  batch = rows()
  with small.use():
    score = lambda seed: log_likelihoods(make(seed=seed), batch["codes"], np.tile(np.arange(6), (8, 1)))
    return batch, score(1), score(2)


@pytest.mark.parametrize(
  "tune",
  [
    TuningConfig(beta=0.1, lam=3.0, uncond=0.4, negatives="permutation"),
    TuningConfig(beta=0.1, lam=0.5, uncond=0, collisions=False),
    *(
      pytest.param(tune, marks=pytest.mark.slow)
      for tune in (
        TuningConfig(beta=0.1, lam=3.0, uncond=0, masked=False),
        TuningConfig("unlearning", beta=0.1, lam=3.0, uncond=0, masked=False),
        TuningConfig("dpo", beta=0.1, uncond=0.4),
        TuningConfig("nca", beta=0.1, uncond=0.4),
      )
    ),
  ],
  ids=lambda tune: f"{tune.method}-{tune.negatives}-{tune.uncond}-{tune.collisions}-{tune.masked}",
)
def test_the_loss_is_that_of_the_likelihoods_under_the_own_and_the_neighbours_class(tune):
  batch, log_p, log_phi = table()
  null_key, order_key, _, _ = jax.random.split(KEY, 4)
  null = np.asarray(jax.random.bernoulli(null_key, tune.uncond, (8,))) if tune.uncond else np.zeros(8, bool)
  others, labels = np.roll(batch["labels"], -1), batch["labels"]
  if tune.negatives == "permutation":
    order = np.asarray(jax.random.permutation(order_key, 8))
    for i, row in enumerate(order):  # each gets the class of the one after it
      others[row] = labels[order[(i + 1) % 8]]
  labels, others = np.where(null, 5, labels), np.where(null, 5, others)
  gaps, at = log_p - log_phi, np.arange(8)
  same = labels == others if tune.collisions else null
  assert tune.uncond == 0 or 0 < null.sum() < 8
  wanted = losses.rows(
    tune.method, gaps[at, labels], gaps[at, others], same, beta=tune.beta, lam=tune.lam, masked=tune.masked
  )
  with small.use():
    means = run_forward(tune, make(), batch, make(seed=2))
  np.testing.assert_allclose(means["loss"], np.mean(wanted), rtol=1e-5)
  np.testing.assert_allclose(means["reward_pos"], gaps[at, labels][~null].mean(), rtol=1e-4)
  np.testing.assert_allclose(means["reward_neg"], gaps[at, others][labels != others].mean(), rtol=1e-4)
  np.testing.assert_allclose(means["ce"], -log_p[at, labels][~null].mean() / 16, rtol=1e-5)


def test_guidance_free_training_is_the_cross_entropy_of_mixed_logits_of_which_one_part_learns():
  tune, batch = TuningConfig("gft", beta=0.3, uncond=0), rows(NEXT_SCALE)

  def dense(model):
    own, null = (model.logits(batch["inputs"], x) for x in (batch["labels"], np.full(8, 5, np.int32)))
    return -jnp.mean(log_likelihood(0.3 * own + 0.7 * jax.lax.stop_gradient(null), batch["codes"]))

  with small.use():
    model = make(NEXT_SCALE)
    value, wanted = jax.jit(jax.value_and_grad(dense))(model)
    means, (grads,) = run(tune, model, batch)
  np.testing.assert_allclose(means["loss"], value, rtol=1e-5)
  for a, b in zip(small.leaves(grads), small.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_images_of_the_reference_itself_are_the_negatives_of_direct_discriminative_optimisation():
  tune = TuningConfig("ddo", beta=0.1, lam=3.0, uncond=0)
  batch = rows(tune=tune)
  with small.use():
    model, reference = make(), make(seed=2)
    gap = lambda codes: (
      log_likelihoods(model, codes, batch["labels"]) - log_likelihoods(reference, codes, batch["labels"])
    )
    pos, neg = gap(batch["codes"]), gap(batch["fakes"])
    means = run_forward(tune, model, batch, reference)
  log_s = lambda x: -np.log1p(np.exp(-x))
  assert np.abs(pos - neg).min() > 0
  np.testing.assert_allclose(means["loss"], -np.mean(log_s(0.1 * pos) + 3 * log_s(-0.1 * neg)) / 3, rtol=1e-5)


# Where a run begins


def test_at_the_start_the_loss_is_exact_and_no_gradient_reaches_the_reference():
  batch, key = rows(), key_that_drops(np.zeros(8, bool), CCA.uncond)
  batch["labels"] = np.array([0, 1, 2, 3, 4, 0, 1, 2], np.int32)  # no two neighbours alike
  with small.use():
    means, (grads, of_reference) = run(CCA, make(), batch, make(), key)
  assert means["loss"] == means["loss_at_start"] == pytest.approx(math.log(2) * (1 + CCA.lam) / CCA.lam, rel=1e-6)
  assert means["drift"] == means["margin"] == means["reward_accuracy"] == 0
  assert all((x == 0).all() for x in small.leaves(of_reference))
  assert max(np.abs(x).max() for x in small.leaves(grads)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("lam", [0.5, 1.0, 1000.0])
@pytest.mark.parametrize("method", ["cca", "ddo"])
def test_the_first_loss_is_ln_2_times_1_and_lambda_over_the_larger_of_both(method, lam):
  tune = TuningConfig(method, lam=lam, uncond=0)
  batch = rows(tune=tune)
  batch["labels"] = np.array([0, 1, 2, 3, 4, 0, 1, 2], np.int32)
  with small.use():
    means = run_forward(tune, make(), batch, make())
  assert means["loss"] == pytest.approx(math.log(2) * (1 + lam) / max(lam, 1), rel=1e-6)


def test_a_run_whose_reference_is_another_model_is_refused_in_one_line():
  with small.use():
    model, batch = make(), to_devices(rows())
    tuning.self_check(model, batch, make(), cfg=CCA)
    with pytest.raises(UserError, match="must start at .*, and log-likelihoods under the model and its reference") as e:
      tuning.self_check(model, batch, make(seed=2), cfg=CCA)
    assert "\n" not in str(e.value)
    tuning.self_check(model, batch, make(seed=2), cfg=TuningConfig("gft", beta=0.5))  # has none


def test_dropout_moves_the_first_loss_and_the_check_sees_it():
  tune = dataclasses.replace(CCA, dropout=True)
  with small.use():
    model = make()
    first, again, other = (run_forward(tune, model, rows(), model, jax.random.key(seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert first["drift"] > 0.1
    with pytest.raises(UserError, match="without dropout"):
      tuning.check_start(first, 16)
    tuning.self_check(model, to_devices(rows()), model, cfg=tune)  # is done without


# Execution


def on_one_device(backbone, tune):
  with small.use():
    return run(tune, make(backbone), rows(backbone, tune), make(backbone, seed=2) if tune.has_reference else None)


@pytest.mark.parametrize(
  ("backbone", "tune", "mesh"),
  [
    (GPT, CCA, MeshConfig(1, 2, 2)),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        (GPT, CCA, MeshConfig(1, 4, 1, "fsdp")),
        (NEXT_SCALE, TuningConfig("ddo", beta=0.1, lam=3.0, uncond=0.4), MeshConfig(1, 2, 2)),
        (GPT, TuningConfig(beta=0.1, lam=3.0, uncond=0.4, negatives="permutation"), MeshConfig(2, 1, 2)),
        (GPT, TuningConfig(beta=0.1, uncond=0.4, dropout=True), MeshConfig(2, 2, 1)),
        (GPT, TuningConfig("gft", beta=0.5, uncond=0.4), MeshConfig(1, 2, 2)),
        (NEXT_SCALE, CCA, MeshConfig(2, 2, 1, "fsdp")),
        (NEXT_SCALE, TuningConfig("gft", beta=0.5, uncond=0.4), MeshConfig(1, 2, 2)),
      )
    ),
  ],
  ids=lambda x: getattr(x, "method", None),
)
def test_several_devices_give_the_loss_and_gradients_of_one_with_negatives_from_the_whole_batch(backbone, tune, mesh):
  with small.use(mesh, devices=4):
    models = [make(backbone, seed, mesh.partition) for seed in (1, 2)[: 1 + tune.has_reference]]
    means, grads = run(tune, models[0], rows(backbone, tune), *models[1:])
  wanted, wanted_grads = on_one_device(backbone, tune)
  for name, value in means.items():
    np.testing.assert_allclose(value, wanted[name], rtol=1e-4, atol=1e-4, err_msg=name)
  for a, b in zip(small.leaves(grads), small.leaves(wanted_grads), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(np.abs(b).max(), 1))


@pytest.mark.parametrize("method", ["cca", pytest.param("ddo", marks=pytest.mark.slow)])
def test_log_likelihoods_of_the_reference_computed_ahead_give_the_same_loss_and_gradients(method):
  tune = dataclasses.replace(CCA, method=method)
  batch = rows(tune=tune)
  with small.use():
    model, reference = make(), make(seed=2)
    wanted, (grads, _) = run(tune, model, batch, reference)
    pairs = {"fakes": batch["fakes"]} if method == "ddo" else {"others": np.roll(batch["labels"], -1)}
    ahead = tuning.reference_log_probs(reference, batch["codes"], batch["labels"], **pairs, batch=8)
    batch |= pairs | {"reference_log_probs": ahead}
    assert {name: x.shape for name, x in batch.items()} == {
      name: x.shape for name, x in tuning.batch_shapes(tune, GPT, 8, cached=True).items()
    }
    means, (cached,) = run(tune, model, batch)
    assert means == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    for a, b in zip(small.leaves(cached), small.leaves(grads), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    if method == "cca":  # the check at the start sees whose they are
      tuning.self_check(reference, to_devices(batch), cfg=tune)
      with pytest.raises(UserError, match="must start at"):
        tuning.self_check(model, to_devices(batch), cfg=tune)


def test_pairs_fixed_for_a_data_set_use_each_label_as_often_and_give_no_image_its_own_place():
  labels = np.arange(50, dtype=np.int32)
  others = tuning.fixed_pairs(labels, 0)
  assert (others != labels).all()
  assert sorted(others) == sorted(labels)
  assert (others != tuning.fixed_pairs(labels, 1)).any()


# Mistakes


@pytest.mark.parametrize(
  ("change", "told"),
  [
    ({"beta": 0.0}, "beta=0.0: must be positive"),
    ({"method": "gft", "beta": 1.0}, "beta=1.0: gft needs one below 1"),
    ({"lam": -1.0}, "lam=-1.0: "),
    ({"uncond": 1.0}, "uncond=1.0: is a share"),
    ({"uncond": -0.1}, "uncond=-0.1: is a share"),
    ({"masked": False}, "masked=False: is the branch of uncond=0"),
  ],
)
def test_settings_out_of_range_are_told_in_one_line(change, told):
  with pytest.raises(UserError, match=told):
    TuningConfig(**change)


def traced(tune, batch, model=GPT, reference=GPT):
  """Traces the loss: nothing is compiled."""
  with small.use():
    new = lambda cfg: jax.eval_shape(
      lambda: (LlamaGen if isinstance(cfg, LlamaGenConfig) else VAR)(jax.random.key(0), cfg)
    )
    f = lambda model, batch, reference: tuning.loss(model, batch, KEY, reference, cfg=tune)
    jax.eval_shape(f, new(model), batch, None if reference is None else new(reference))


@pytest.mark.parametrize(
  ("case", "told"),
  [
    (lambda: traced(TuningConfig(), rows(count=1)), "batch=1: an image alone has no other"),
    (
      lambda: traced(TuningConfig(), rows(), reference=dataclasses.replace(GPT, layers=2)),
      "reference=.* against .*: is of another architecture",
    ),
    (lambda: traced(TuningConfig(), rows(), reference=None), "reference=absent: "),
    (
      lambda: traced(TuningConfig(dropout=True), rows(), dataclasses.replace(GPT, class_dropout=0.1)),
      "model.class_dropout=0.1: ",
    ),
    (lambda: traced(TuningConfig(dropout=True), rows(cached=True)), "dropout=True: reference_log_probs"),
    (
      lambda: traced(TuningConfig(), {k: x for k, x in rows(cached=True).items() if k != "others"}),
      "others=absent: reference_log_probs are of fixed pairs",
    ),
    (lambda: traced(TuningConfig(), rows(), NEXT_SCALE, NEXT_SCALE), "inputs=absent: VAR reads"),
  ],
  ids=range(7),
)
def test_what_cannot_be_tuned_is_told_in_one_line_before_anything_is_compiled(case, told):
  with pytest.raises(UserError, match=told) as e:
    case()
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  ("change", "told"),
  [
    ({"labels": [0, 5]}, "labels=5: must lie in 0 .. 4"),
    ({"labels": [-1, 0]}, "labels=-1: must lie in 0"),
    ({"codes": np.full((2, 16), 16)}, "codes=16: must lie in 0 .. 15"),
    ({"codes": np.zeros((2, 15), int)}, "codes=.2, 15.: the model writes 16 tokens"),
    ({"labels": [0]}, "labels=.1.: must be 2"),
  ],
)
def test_codes_and_classes_of_another_model_are_told(change, told):
  data = {"codes": np.zeros((2, 16), int), "labels": [0, 4]} | change
  with pytest.raises(UserError, match=told):
    tuning.check_data(np.asarray(data["codes"]), np.asarray(data["labels"]), GPT)
