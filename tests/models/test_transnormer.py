"""TransNormerLLM has the released code's numbers, on one device and on several, at once and step by step."""

import dataclasses
import functools
import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from research import mesh as meshes
from research.errors import UserError
from research.generation import Sampling, generate
from research.kernels.lightning_attention.features import phases
from research.mesh import MeshConfig, to_devices
from research.models import convert
from research.models.decoder import next_token_loss, unstack
from research.models.transnormer import TransNormer, TransNormerConfig, flops_per_token
from research.nn.linear_attention import decay_rates
from research.nn.norms import SRMSNorm
from research.nn.precision import POLICIES
from tests import small

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "transnormer"
RELEASED = pytest.mark.parametrize("name", ["scaled", "tied", "lrpe_all"])
DECAY = np.float32([1, 0.99, 0.9, 0.5])
MODEL = TransNormerConfig(
  vocab=64, width=32, layers=2, heads=4, head_dim=8, glu_width=48, precision="float32", layer_loop="scan"
)


def varied(**changes):
  return dataclasses.replace(MODEL, **changes)


def golden(name):
  return convert.load(GOLDENS / name, precision="float32")[1], np.load(GOLDENS / name / "expected.npz")


def rows(tokens):
  """One document a row: tokens, segment ids, positions."""
  tokens = np.asarray(tokens, np.int32)
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  return tokens, np.ones_like(tokens), positions


def part(x, start, stop):
  return [a[:, start:stop] for a in x]


def loss_and_grads(model, batch):
  def objective(model, batch):
    mean = next_token_loss(model, batch, None)["loss"]
    return mean.total / mean.weight

  return jax.block_until_ready(jax.jit(jax.value_and_grad(objective))(model, to_devices(batch)))


logits = jax.jit(lambda model, *x: model.logits(*x))


def in_parts(model, x, lengths):
  """Logits of rows given as a prefill and appended chunks of these lengths, and the rest token by token."""
  n = x[0].shape[1]
  lengths = [*lengths, *[1] * (n - sum(lengths))]
  prefill = jax.jit(lambda model, *x: model.prefill(*x, n))
  extend = jax.jit(lambda model, cache, *x: model.extend(*x, cache))
  hidden, cache = prefill(model, *part(x, 0, lengths[0]))
  out, at = [hidden], lengths[0]
  for length in lengths[1:]:
    hidden, cache = extend(model, cache, *part(x, at, at + length))
    out.append(hidden)
    at += length
  return model.unembed(jnp.concatenate(out, axis=1))


# Parity with the released code


@RELEASED
def test_every_layer_computes_what_the_released_code_computes(name):
  with small.use():
    model, expected = golden(name)
    tokens, segments, positions = rows(expected["input_ids"])
    x, layer, run = model._embed(tokens, positions), 0, jax.jit(lambda block, *x: block(*x))
    np.testing.assert_allclose(x, expected["hidden_0"], atol=1e-5)
    for blocks, decays in model._stacks():
      for block, decay in zip(unstack(blocks), decays, strict=True):
        np.testing.assert_allclose(-np.log(decay), expected["slopes_per_layer"][layer], rtol=1e-4, atol=1e-7)
        x, (state, _) = run(block, x, segments, positions, decay)
        wanted = expected[f"infer_path/state_layer{layer}"]
        np.testing.assert_allclose(state, wanted, atol=1e-5 * np.abs(wanted).max())
        layer += 1
        if f"hidden_{layer + 1}" in expected:  # the last is after the final norm
          np.testing.assert_allclose(x, expected[f"hidden_{layer}"], atol=1e-4)
    np.testing.assert_allclose(model.norm(x), expected[f"hidden_{layer}"], atol=2e-5)
    np.testing.assert_allclose(logits(model, tokens, segments, positions), expected["logits"], atol=5e-5)


@RELEASED
def test_the_loss_and_its_gradients_are_the_released_codes(name):
  with small.use():
    model, expected = golden(name)
    tokens, segments, positions = rows(expected["input_ids"])
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "segment_ids": segments, "positions": positions}
    batch["weights"] = (positions < tokens.shape[1] - 1).astype(np.float32)
    loss, grads = loss_and_grads(model, batch)
  np.testing.assert_allclose(loss, expected["loss_shifted_ce"], rtol=1e-6)
  grads = {convert._name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(grads)}
  tensors = convert.read(GOLDENS / name).tensors
  checked = [key.removeprefix("grad/") for key in expected if key.startswith("grad/")]
  assert any("theta" in key for key in checked)
  assert len(checked) > 5
  for key in checked:
    gradient = tensors[key].as_file(grads[tensors[key].param])
    assert np.abs(gradient).max() > 1e-3  # else the next line shows little
    np.testing.assert_allclose(gradient, expected[f"grad/{key}"], atol=2e-5, err_msg=key)


@RELEASED
def test_decoding_says_what_the_released_code_says(name):
  with small.use():
    model, expected = golden(name)
    n, x = int(expected["decode/prefill_len"]), rows(expected["input_ids"])
    np.testing.assert_allclose(in_parts(model, x, [n]), expected["decode/logits"], atol=5e-5)
    prompts = expected["greedy/ids"][:, :-16]
    made = generate(model, prompts.tolist(), tokens=16, sampling=Sampling(temperature=0))
  np.testing.assert_array_equal(made, expected["greedy/ids"][:, -16:])


@pytest.mark.parametrize("name", ["scaled", "lrpe_all"])
def test_padding_is_a_document_of_its_own(name):
  with small.use():
    model, expected = golden(name)
    tokens, _, positions = rows(expected["input_ids"])
    real = expected["padded/attention_mask"]
    out = np.asarray(logits(model, tokens, real.astype(np.int32), positions))  # phases know distances only
  assert 0 < real.mean() < 1
  np.testing.assert_allclose(out[real > 0], expected["padded/infer_path_logits"][real > 0], atol=5e-5)


def test_several_chunks_are_as_the_released_codes_blocks():
  with small.use():
    model, expected = golden("scaled")
    out = logits(model, *rows(expected["long/input_ids"]))[:, expected["long/positions"]]
  np.testing.assert_allclose(out, expected["long/infer_path_logits"], atol=5e-5)


def test_the_cache_gives_the_full_forward_where_the_released_training_path_does_not():
  with small.use():
    model, expected = golden("divergence")
    n, x = int(expected["prefill_len"]), rows(expected["input_ids"])
    np.testing.assert_allclose(logits(model, *x), expected["full_logits"], atol=5e-5)
    cached = in_parts(model, x, [n])
  np.testing.assert_allclose(cached, expected["full_logits"], atol=5e-5)
  assert np.abs(expected["train_path_cached_decode_logits"] - cached)[:, n:].max() > 1


def test_rates_of_decay_are_the_published_ones():
  table = np.load(GOLDENS / "decay_table.npz")
  kinds = {"alibi_code": "released", "paper_h0based": "paper"}
  assert {key.split("/")[1].split("_")[0] for key in table} == {"H2", "H4", "H8", "H12", "H40"}
  for key, expected in table.items():
    kind, size = key.split("/")
    heads, layer, layers = (int(s[1:]) for s in size.split("_"))
    np.testing.assert_allclose(decay_rates(kinds[kind], heads, layers)[layer], expected, rtol=2e-7, err_msg=key)


def test_the_paper_and_the_released_code_order_their_heads_the_other_way_round():
  first = lambda kind: np.exp(-decay_rates(kind, 8, 24)[0])
  np.testing.assert_allclose(first("paper"), np.exp(-np.arange(8)), rtol=1e-12)
  np.testing.assert_allclose(first("released"), [0.607, 0.779, 0.882, 0.939, 0.969, 0.984, 0.992, 0.996], atol=1e-3)
  assert (decay_rates("none", 8, 24) == 0).all()
  np.testing.assert_array_equal(decay_rates("released", 8, 24, False), np.tile(2.0 ** -np.arange(1, 9), (24, 1)))
  assert np.isfinite(decay_rates("released", 3, 1)).all()


def test_phases_and_the_norm_are_the_released_codes():
  units = np.load(GOLDENS / "units.npz")
  for case in ("h4_d8_n11_off0", "h2_d6_n5_off13"):
    x, y, theta = (units[f"{case}/{name}"] for name in ("x", "y", "theta_init"))
    batch, heads, n, d = x.shape
    at = np.broadcast_to(np.arange(n, dtype=np.int32) + int(case.split("off")[1]), (batch, n))
    out = phases(jnp.asarray(x.swapaxes(1, 2)), at, theta[:, 0])
    np.testing.assert_allclose(out.swapaxes(1, 2), y, atol=1e-6)
    with small.use():
      model = TransNormer(jax.random.key(0), varied(width=heads * d, heads=heads, head_dim=d))
      np.testing.assert_allclose(model.lrpe_blocks.attention.theta[...][0], theta[:, 0], rtol=1e-6)
  norm = SRMSNorm(24, 1e-6, POLICIES["float32"])
  np.testing.assert_allclose(norm(jnp.asarray(units["srmsnorm/x"])), units["srmsnorm/y"], atol=1e-6)


# Decoding


@pytest.mark.parametrize(
  "change",
  [{}, {"position": "lrpe_all", "decay": "paper"}, {"position": "ape", "layer_loop": "unroll", "gate": False}],
  ids=str,
)
def test_decoding_in_chunks_is_the_full_forward(change):
  batch = small.batch(rows=3, length=40)  # two or three documents a row: some begin inside a chunk, some with one
  x = [batch[name] for name in ("tokens", "segment_ids", "positions")]
  with small.use():
    model = TransNormer(jax.random.key(0), varied(layers=3, **change))
    whole = logits(model, *x)
    np.testing.assert_allclose(in_parts(model, x, [7, 1, 12, 5, 5]), whole, atol=1e-5)


def test_a_state_has_one_size():
  with small.use():
    model = TransNormer(jax.random.key(0), varied(layers=3))
    shapes = {n: jax.eval_shape(lambda n=n: model.prefill(*rows(np.zeros((2, n))), n)[1]) for n in (1, 500)}
  assert jax.tree.map(lambda x: x.shape, shapes[1]) == jax.tree.map(lambda x: x.shape, shapes[500])
  assert [x.shape for x, _ in shapes[1].states] == [(1, 2, 4, 16, 8), (2, 2, 4, 8, 8)]


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["released", "paper"])
def test_ten_thousand_steps_end_where_the_full_forward_does(decay):
  length = 10_000
  x = rows(np.random.default_rng(0).integers(64, size=(1, length)))
  with small.use():
    model = TransNormer(jax.random.key(0), varied(decay=decay, layers=3))
    whole = logits(model, *x)

    @jax.jit
    def steps(*x):
      first, cache = model.prefill(*part(x, 0, 1), 1)

      def step(cache, token):
        hidden, cache = model.extend(*(a[:, None] for a in token), cache)
        return cache, hidden[:, 0]

      _, hidden = jax.lax.scan(step, cache, tuple(a[:, 1:].T for a in x))
      return model.unembed(jnp.concatenate([first, hidden.swapaxes(0, 1)], axis=1))

    error = np.abs(np.asarray(steps(*x)) - whole)
  # The paper's first head never forgets: at a few of the text's positions most of its sum cancels. There both are
  # 1.4e-5 from float64 (with the same float32 phases), and neither nearer; sums carried exactly change nothing.
  assert error.max() < {"released": 1e-5, "paper": 3e-5}[decay]
  assert error[:, -100:].max() < 1e-5


# What no position may see


@pytest.mark.parametrize("position", ["lrpe_first", "ape"])
def test_no_position_sees_a_later_one(position):
  length = 9
  x = rows(np.arange(length)[None])  # a token of its own for every position: the table's rows tell them apart
  with small.use():
    model = TransNormer(jax.random.key(0), varied(vocab=length, position=position))

    @jax.jit
    def sensitivity(model, t):
      # a sine: no symmetry of the output cancels its gradient
      f = lambda model: jnp.sum(jnp.where((x[0] == t)[..., None], jnp.sin(model(*x)), 0))
      return jnp.abs(jax.grad(f)(model).embed[...]).sum(1)

    for t in range(length):
      seen = np.asarray(sensitivity(model, t))
      assert (seen[t + 1 :] == 0).all()
      assert (seen[: t + 1] > 0).all()


def test_nothing_leaks_from_one_document_into_another():
  length, cut = 12, 5
  at = np.arange(length, dtype=np.int32)[None]
  x = (at, np.where(at < cut, 1, 2), np.where(at < cut, at, at - cut))
  with small.use():
    model = TransNormer(jax.random.key(0), varied(vocab=length, layers=3))

    @jax.jit
    def leak(model, document):
      f = lambda model: jnp.sum(jnp.where((x[1] == document)[..., None], jnp.sin(model(*x)), 0))
      return jax.grad(f)(model).embed[...]

    for document, own, others in ((1, slice(0, cut), slice(cut, None)), (2, slice(cut, None), slice(0, cut))):
      gradient = np.asarray(leak(model, document))
      assert (gradient[others] == 0).all()
      assert (gradient[own] != 0).any(axis=1).all()
    alone = logits(model, *(a[:, cut:] for a in x))
    np.testing.assert_allclose(logits(model, *x)[:, cut:], alone, atol=5e-6)


# The layer with its parts fused


@pytest.mark.parametrize("gate", [True, False])
def test_a_norm_after_the_gate_by_a_number_a_token_is_the_norm_before_it(gate):
  batch = small.batch(rows=3, length=40)
  rng = np.random.default_rng(0)
  with small.use():
    layer = unstack(TransNormer(jax.random.key(0), varied(gate=gate)).lrpe_blocks)[0].attention
    qkvu = rng.standard_normal((3, 40, 4, 4 if gate else 3, 8)).astype(np.float32)
    weights = rng.standard_normal((3, 40, 32)).astype(np.float32)

    def value_and_grads(f):
      def call(layer, qkvu):
        y, (state, _) = getattr(layer, f)(qkvu, batch["segment_ids"], batch["positions"], DECAY, None)
        return (y * weights).sum() + jnp.sin(state).sum(), (y, state)

      return jax.jit(jax.value_and_grad(call, argnums=(0, 1), has_aux=True))(layer, qkvu)

    for a, b in zip(*(jax.tree.leaves(value_and_grads(f)) for f in ("_fused", "_by_parts")), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# Several devices


@functools.cache
def on_one_device(**changes):
  with small.use():
    return loss_and_grads(TransNormer(jax.random.key(1), varied(**changes)), small.batch())


def same_on_four(mesh, **changes):
  loss, grads = on_one_device(**changes)
  with small.use(mesh, devices=4):
    model = jax.jit(lambda key: TransNormer(key, varied(**changes), mesh.partition))(jax.random.key(1))
    loss_4, grads_4 = loss_and_grads(model, small.batch())
  np.testing.assert_allclose(loss_4, loss, rtol=1e-5)
  for a, b in zip(small.leaves(grads), small.leaves(grads_4), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mesh", small.MESHES, ids=lambda x: f"{x.replica}x{x.data}x{x.model}-{x.partition}")
def test_every_partition_gives_the_loss_and_gradients_of_one_device(mesh):
  same_on_four(mesh)


@pytest.mark.parametrize(
  "change",
  [
    {"position": "lrpe_all", "decay": "paper", "activation": "1+elu", "norm": "rms"},
    {"position": "ape", "decay": "none", "gate": False, "norm": "layer", "tie_embeddings": False},
    {"position": "none", "temperature": False, "activation": "none", "scale_embedding": False, "remat": "full"},
  ],
  ids=lambda x: x["position"],
)
def test_every_option_trains_with_heads_cut_as_on_one_device(change):
  same_on_four(MeshConfig(1, 2, 2), **change)


def test_heads_cut_along_the_mesh_are_normed_together():
  x = np.random.default_rng(0).standard_normal((4, 6, 32)).astype(np.float32) * np.repeat([1, 30], 16)
  norm = SRMSNorm(32, 1e-6, POLICIES["float32"])
  with small.use(MeshConfig(1, 2, 2), devices=4):
    cut = jax.jit(norm)(jax.device_put(x, jax.P(meshes.BATCH, None, "model")))
    assert cut.sharding.spec == jax.P(meshes.BATCH, None, "model")
  np.testing.assert_allclose(cut, x / np.sqrt((x**2).mean(-1, keepdims=True)), rtol=1e-5)


def test_heads_cut_along_the_mesh_keep_their_own_decays_in_generation():
  prompts = [[3, 1, 4, 1], [5], [9, 2, 6]]  # three rows on two batch shards
  with small.use():
    expected = generate(TransNormer(jax.random.key(0), MODEL), prompts, tokens=6, seed=1)
  with small.use(MeshConfig(1, 2, 2), devices=4):
    assert generate(TransNormer(jax.random.key(0), MODEL), prompts, tokens=6, seed=1) == expected


# Sizes


@pytest.mark.parametrize(
  ("layers", "heads", "width", "glu_width", "published", "off"),
  [
    (24, 8, 1024, 2816, 384_974_848, 36_864),
    (16, 16, 2048, 5632, 992_165_888, 0),
    (32, 20, 2560, 6912, 2_876_006_400, 0),
    (30, 32, 4096, 11008, 6_780_547_072, 0),
    (36, 40, 5120, 13824, 12_620_195_840, 0),
  ],
  ids=["385M", "1B", "3B", "7B", "13B"],
)
def test_published_sizes_have_their_parameters(layers, heads, width, glu_width, published, off):
  sizes = {"layers": layers, "heads": heads, "width": width, "head_dim": width // heads, "glu_width": glu_width}
  cfg = TransNormerConfig(vocab=50272, **sizes)
  with jax.sharding.use_abstract_mesh(meshes.abstract_mesh(MeshConfig())):
    model = jax.eval_shape(lambda key: TransNormer(key, cfg), jax.eval_shape(lambda: jax.random.key(0)))
  count = sum(x.size for x in jax.tree.leaves(model))
  # The published counts have phases for every second channel of every layer, the released weights for all of the first.
  assert abs(count - width + layers * width // 2 - published) == off
  flops = flops_per_token(cfg)
  state = flops.pop("attention state")
  assert sum(flops.values()) == 6 * (count - width)  # tied: the table is the head
  assert state == 3 * 4 * (layers + 1) * width * width // heads


@pytest.mark.parametrize(
  ("change", "told"),
  [
    ({"heads": 0}, "heads=0: must be at least 1"),
    ({"position": "ape", "width": 31}, "width=31: must be even"),
    ({"norm_eps": 0.0}, "norm_eps=0.0: must be positive"),
  ],
)
def test_sizes_that_do_not_fit_are_told(change, told):
  with pytest.raises(UserError, match=told):
    varied(**change)


def test_sizes_that_the_mesh_cannot_cut_are_told():
  for change, told in (({"heads": 3}, "model.heads=3"), ({"glu_width": 7}, "model.glu_width=7")):
    with pytest.raises(UserError, match=f"{told}: must divide by mesh.model=2"):
      varied(**change).check_mesh({"replica": 1, "data": 1, "model": 2}, "fsdp_tp")
  with pytest.raises(UserError, match=r"model.width=32: must divide by mesh.data=3"):
    MODEL.check_mesh({"replica": 1, "data": 3, "model": 1}, "fsdp")
  for kernel, needs in (("pallas_tpu", "tpu"), ("pallas_gpu", "gpu")):
    with pytest.raises(UserError, match=f"model.attention_kernel={kernel}: needs a {needs}"):
      varied(attention_kernel=kernel).check_mesh({"replica": 1, "data": 1, "model": 1}, "fsdp")


def test_parameters_stay_float32_and_the_state_too_where_products_are_bfloat16():
  with small.use():
    model = TransNormer(jax.random.key(0), varied(precision="bfloat16"))
    x = rows(np.zeros((2, 5)))
    hidden, cache = jax.eval_shape(lambda: model.prefill(*x, 5))
    exact = logits(TransNormer(jax.random.key(0), MODEL), *x)
    np.testing.assert_allclose(logits(model, *x), exact, atol=0.1)
  assert hidden.dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(cache.states)} == {np.dtype("float32")}
  assert {x.dtype for x in small.leaves(model)} == {np.dtype("float32")}
