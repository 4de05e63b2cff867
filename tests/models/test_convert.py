"""Published weights are read as their own code computes them, and written back to the byte."""

import filecmp
import json
import shutil

import jax
from jax import numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.kvshift.attention import KVShift
from research.errors import UserError
from research.mesh import MeshConfig
from research.models import convert
from research.models.decoder import next_token_loss
from research.models.transnormer import TransNormer, TransNormerConfig
from research.nn import rope
from research.nn.rope import RopeScaling
from research.tools import logits
from tests import small
from tests.models.weights import GOLDENS, K, Q, abstract, directory, golden, load, on_one_device, refused, row, same

# Parity with the code that the weights were published with


@pytest.mark.parametrize("form", ["single", "sharded", "version 4"])
def test_a_llama_computes_what_transformers_computes(form, tmp_path):
  path = GOLDENS / "llama" / ("sharded" if form == "sharded" else "")
  if form == "version 4":
    shutil.copy(path / "weights.safetensors", tmp_path)
    path = shutil.copy(path / "config_v4_style.json", tmp_path / "config.json").parent
  matches(path, golden("llama"))


def test_a_shifting_llama_computes_what_its_reference_computes():
  matches(GOLDENS / "kvshift", golden("kvshift"))


def matches(path, expected):
  with small.use():
    _, model = load(path)
    forward = jax.jit(lambda model, *rows: (model(*rows), model.logits(*rows)))
    tokens = expected["input_ids"].astype(np.int32)
    at = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    ones = np.ones_like(tokens)
    embedded = model.embed[...][tokens]
    first = jax.tree.map(lambda x: x[0], model.blocks)
    np.testing.assert_allclose(embedded, expected["hidden_after_embed"], atol=1e-6)
    np.testing.assert_allclose(first(embedded, ones, at), expected["hidden_after_layer0"], atol=1e-4)
    final, out = forward(model, tokens, ones, at)
    np.testing.assert_allclose(final, expected["hidden_final_normed"], atol=1e-4)
    np.testing.assert_allclose(out, expected["logits"], atol=1e-4)


def test_the_loss_and_the_gradient_of_every_tensor_are_the_references():
  expected = golden("kvshift")
  tokens = expected["input_ids"].astype(np.int32)
  batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "segment_ids": np.ones_like(tokens)}
  batch["positions"] = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  batch["weights"] = (batch["positions"] < tokens.shape[1] - 1).astype(np.float32)
  batch = jax.tree.map(jnp.asarray, batch)
  weights = convert.read(GOLDENS / "kvshift")
  with small.use():
    _, model = load(GOLDENS / "kvshift")

    @jax.jit
    @jax.value_and_grad
    def loss(model):
      mean = next_token_loss(model, batch, None)["loss"]
      return mean.total / mean.weight

    value, grads = loss(model)
  np.testing.assert_allclose(value, expected["loss_next_token_ce"], atol=1e-5)
  grads = {convert._name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(grads)}
  assert {f"grad/{key}" for key in weights.tensors} == {key for key in expected if key.startswith("grad/")}
  for key, tensor in weights.tensors.items():
    gradient = tensor.as_file(grads[tensor.param])
    assert np.abs(gradient).max() > 1e-5  # else the next line shows little
    np.testing.assert_allclose(gradient, expected[f"grad/{key}"], atol=1e-4, rtol=1e-4, err_msg=key)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_slowed_rotary_frequencies_are_the_published_ones(kind):
  head_dim, base, length = 64, 500_000.0, 300
  scaling = RopeScaling(kind, factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=512)
  inverse = base ** -(np.arange(0, head_dim, 2) / head_dim)  # float64
  expected = []
  for f in inverse:
    wavelength = 2 * np.pi / f
    if kind == "linear" or wavelength > 512 / 1.0:
      expected.append(f / 8)
    elif wavelength < 512 / 4.0:
      expected.append(f)
    else:
      smooth = (512 / wavelength - 1.0) / (4.0 - 1.0)
      expected.append((1 - smooth) * f / 8 + smooth * f)
  if kind == "llama3":  # all three branches are taken
    assert len({np.sign(f - e) + (f / 8 < e < f) for f, e in zip(inverse, expected, strict=True)}) == 3
  positions = np.arange(length, dtype=np.int32)[None]
  cos, sin = rope.angles(positions, head_dim, base, scaling)
  angle = positions[:, :, None, None] * np.array(expected)
  np.testing.assert_allclose(cos, np.cos(angle), atol=1e-4)
  np.testing.assert_allclose(sin, np.sin(angle), atol=1e-4)
  np.testing.assert_allclose(scaling.scale(jnp.asarray(inverse, jnp.float32)), expected, rtol=1e-6)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
  ("settings", "base", "scaling"),
  [
    ({"rope_theta": 5e5}, 5e5, RopeScaling()),
    ({}, 1e4, RopeScaling()),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, 5e5, RopeScaling("linear", 2.0)),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 1e4, RopeScaling("llama3", 8.0, 1.0, 4.0, 64)),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 7, **LLAMA3}}, 7.0, RopeScaling("llama3", 8, 1, 4, 64)),
  ],
)
def test_rotary_settings_are_read_in_every_published_form_and_written_back(settings, base, scaling, tmp_path):
  weights = convert.read(
    directory(tmp_path / "in", settings=settings, drop=["rope_parameters"] * ("rope_parameters" not in settings))
  )
  assert weights.settings["rope_base"] == base
  assert weights.settings["rope_scaling"] == scaling
  with small.use():
    cfg, model = load(tmp_path / "in")
    assert cfg.rope_scaling == model.cfg.rope_scaling == scaling
    convert.export(model, tmp_path / "out", like=weights)
  assert convert.read(tmp_path / "out").settings == weights.settings


def test_a_scaled_rotary_embedding_reaches_the_attention(tmp_path):
  scaled = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}}
  tokens = golden("llama")["input_ids"]
  with small.use():
    _, model = load(directory(tmp_path, settings=scaled))
    out = logits.logits(model, 97, tokens)
  assert np.abs(out - golden("llama")["logits"])[:, 1:].max() > 0.01


def test_sizes_that_config_json_leaves_out_follow_from_the_others(tmp_path):
  small_heads = {"num_attention_heads": 6, "hidden_size": 48}
  settings = convert.read(directory(tmp_path / "a", settings=small_heads, drop=["head_dim"])).settings
  assert settings["head_dim"] == 8
  with small.use():
    convert.export(on_one_device(KVShift, kv_heads=4, layers=1), tmp_path / "b")
  said = json.loads((tmp_path / "b" / "config.json").read_text())
  del said["num_key_value_heads"]
  (tmp_path / "b" / "config.json").write_text(json.dumps(said))
  assert convert.read(tmp_path / "b").settings["kv_heads"] == 4


# Export is the inverse of import


@pytest.mark.parametrize("name", ["llama", "kvshift", "transnormer/scaled", "transnormer/tied", "transnormer/lrpe_all"])
def test_weights_are_written_back_to_the_byte(name, tmp_path):
  with small.use():
    _, model = load(GOLDENS / name)
    convert.export(model, tmp_path / "out", like=convert.read(GOLDENS / name))
  assert filecmp.cmp(tmp_path / "out" / "model.safetensors", GOLDENS / name / "weights.safetensors", shallow=False)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_shards_are_written_back_to_the_byte(tmp_path):
  source = GOLDENS / "llama" / "sharded"
  with small.use():
    _, model = load(source)
    convert.export(model, tmp_path / "out", shard_bytes=130_000)
  for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
    assert filecmp.cmp(tmp_path / "out" / name, source / name, shallow=False)
  index = lambda path: json.loads((path / "model.safetensors.index.json").read_text())
  assert index(tmp_path / "out") == index(source)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_floats_come_back_to_the_byte(dtype, tmp_path):
  kind = jnp.dtype(dtype)
  special = np.array([0.0, -0.0, jnp.finfo(kind).smallest_subnormal, jnp.finfo(kind).max, -jnp.inf, 1 / 3], kind)
  tensors = {k: v.astype(kind) for k, v in load_file(GOLDENS / "llama" / "weights.safetensors").items()}
  tensors[Q].ravel()[: len(special)] = special
  tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)  # dtypes may be mixed
  source = directory(tmp_path / "in", tensors=tensors, settings={"dtype": dtype})
  with small.use():
    _, model = load(source)
    assert model.embed[...].dtype == jnp.float32
    convert.export(model, tmp_path / "out", like=convert.read(source))
  for key, x in load_file(tmp_path / "out" / "model.safetensors").items():
    assert x.dtype == tensors[key].dtype
    assert x.tobytes() == tensors[key].tobytes(), key
  assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize(
  ("mix", "changes"),
  [
    (None, {}),
    (KVShift, {}),
    (None, {"kv_heads": 1}),
    (KVShift, {"kv_heads": 4, "layers": 1}),
    (None, {"tie_embeddings": True, "head_dim": 16, "vocab": 7}),
  ],
  ids=["grouped", "grouped kvshift", "one kv head", "all kv heads kvshift", "tied, wide heads"],
)
def test_a_model_comes_back_from_its_export(mix, changes, tmp_path):
  model = on_one_device(mix, **changes)
  with small.use():
    convert.export(model, tmp_path / "x")
    cfg, back = load(tmp_path / "x", partition="fsdp_tp")
  assert cfg == model.cfg
  assert jax.tree.structure(back) == jax.tree.structure(model)
  same(back, model)
  if model.cfg.tie_embeddings:
    assert "lm_head.weight" not in load_file(tmp_path / "x" / "model.safetensors")


def test_the_dtype_of_an_export_can_be_chosen_where_the_values_fit(tmp_path):
  with small.use():
    model = on_one_device()
    convert.export(model, tmp_path / "x", dtype="bfloat16")
    assert {str(x.dtype) for x in load_file(tmp_path / "x" / "model.safetensors").values()} == {"bfloat16"}
    _, back = load(tmp_path / "x")
    same(jax.tree.map(lambda x: x.astype(jnp.bfloat16), model), jax.tree.map(lambda x: x.astype(jnp.bfloat16), back))
    big = jax.tree.map(lambda x: x * 1e6, model)
    with pytest.raises(UserError, match="dtype=float16: is too small for the values of"):
      convert.export(big, tmp_path / "y", dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]  # nothing half-written
    with pytest.raises(UserError, match="is there already"):
      convert.export(model, tmp_path / "x")
    with pytest.raises(UserError, match="qk_norm=True"):
      convert.export(abstract(qk_norm=True), tmp_path / "y")
    with pytest.raises(UserError, match="of no family"):
      convert.export(abstract(lambda key, cfg, partition: lambda *qkvs: qkvs[:3]), tmp_path / "y")


@pytest.mark.parametrize("mix", [None, KVShift], ids=["plain", "kvshift"])
def test_four_devices_get_their_cuts_of_what_one_device_gets(mix, tmp_path):
  mesh = MeshConfig(1, 2, 2, "fsdp_tp")
  model = on_one_device(mix)
  with small.use():
    convert.export(model, tmp_path / "x")
  with small.use(mesh, devices=4):
    _, cut = load(tmp_path / "x", partition="fsdp_tp")
    for x, y in zip(jax.tree.leaves(cut), jax.tree.leaves(abstract(mix)), strict=True):
      assert x.sharding.spec == y.sharding.spec
    assert len({str(s.index) for s in cut.blocks.attention.qkv[...].addressable_shards}) == 4
    convert.export(cut, tmp_path / "y")
  same(cut, model)
  assert filecmp.cmp(tmp_path / "x" / "model.safetensors", tmp_path / "y" / "model.safetensors", shallow=False)


# Families, and names that are not settled


def test_a_tied_head_may_be_in_the_file_if_it_is_the_same(tmp_path):
  embed = load_file(GOLDENS / "llama" / "weights.safetensors")["model.embed_tokens.weight"]
  tied = {"tie_word_embeddings": True}
  source = directory(tmp_path / "a", settings=tied, tensors={"lm_head.weight": embed})
  with small.use():
    _, model = load(source)
    assert model.head is None
    convert.export(model, tmp_path / "b", like=convert.read(source))
  assert filecmp.cmp(tmp_path / "b" / "model.safetensors", source / "model.safetensors", shallow=False) or sorted(
    load_file(tmp_path / "b" / "model.safetensors")
  ) == sorted(load_file(source / "model.safetensors"))
  lines = refused(directory(tmp_path / "c", settings=tied))
  assert row(lines, "lm_head.weight") == ["other values", "those of model.embed_tokens.weight"]
  lines = refused(directory(tmp_path / "d", drop=["lm_head.weight"]))
  assert row(lines, "lm_head.weight") == ["absent", "[97, 48]"]


def test_shifting_weights_are_known_by_their_keys_too(tmp_path):
  family = lambda path: convert.read(path).family.name
  assert family(directory(tmp_path / "a", "kvshift", drop=["kv_shift"])) == "kvshift"
  assert family(directory(tmp_path / "b", "kvshift", {"model_type": "kvshift"}, drop=["kv_shift"])) == "kvshift"
  assert family(GOLDENS / "llama") == "llama"
  lines = refused(directory(tmp_path / "c", "kvshift", {"kv_shift": False}), "llama model")
  assert row(lines, K.format(2)) == ["F32 [2, 2]", "absent"]
  lines = refused(directory(tmp_path / "d", "llama", {"kv_shift": True}), "kvshift model")
  assert row(lines, K.format(0)) == ["absent", "[2, 2]"]
  both = directory(tmp_path / "e", "kvshift", {"model_type": "kvshift", "kv_shift": False})
  assert len(refused(both, "kv_shift=False", "contradicts the model_type")) == 1


def test_the_names_of_the_coefficients_can_be_told(tmp_path):
  names = {"key": "self_attn.alpha", "value": "self_attn.beta"}
  held = load_file(GOLDENS / "kvshift" / "weights.safetensors")
  renamed = {k.replace(".K", ".alpha").replace(".V", ".beta"): v for k, v in held.items() if k[-2:] in (".K", ".V")}
  drop = [k for k in held if k[-2:] in (".K", ".V")]
  source = directory(tmp_path / "a", "kvshift", tensors=renamed, drop=drop)
  refused(source, "self_attn.alpha", "self_attn.K")
  told = convert.read(source, {"kv_shift_names": names})
  with small.use():
    _, model = load(GOLDENS / "kvshift")
    convert.export(model, tmp_path / "b", like=told)
    same(load(tmp_path / "b")[1], model)  # the names are in its config.json
  assert load_file(tmp_path / "b" / "model.safetensors").keys() == load_file(source / "model.safetensors").keys()
  refused(
    directory(tmp_path / "c", "kvshift", {"kv_shift_names": {"key": "x"}}), "kv_shift_names={'key': 'x'}", "self_attn.K"
  )


# What is refused, and how it is told


def make_transnormer(**changes):
  sizes = {"vocab": 64, "width": 32, "layers": 3, "heads": 4, "head_dim": 8, "glu_width": 48, "precision": "float32"}
  return TransNormer(jax.random.key(3), TransNormerConfig(**sizes | {"layer_loop": "scan"} | changes))


@pytest.mark.parametrize(
  "changes",
  [
    {"position": "none", "scale_embedding": False, "tie_embeddings": False},
    {"head_dim": 6, "activation": "1+elu"},
    {"layers": 1},
  ],
  ids=str,
)
def test_a_transnormer_comes_back_from_its_export(changes, tmp_path):
  with small.use():
    model = make_transnormer(**changes)
    convert.export(model, tmp_path / "x")
    cfg, back = load(tmp_path / "x", partition="fsdp_tp")
  assert cfg == model.cfg
  assert jax.tree.structure(back) == jax.tree.structure(model)
  same(back, model)


@pytest.mark.parametrize("change", [{"decay": "paper"}, {"gate": False}, {"norm": "rms"}, {"position": "ape"}], ids=str)
def test_a_transnormer_that_was_never_released_is_not_exported_as_one(change, tmp_path):
  (name, value), *_ = change.items()
  with small.use(), pytest.raises(UserError, match=f"model.{name}={value}: released files have no place for it"):
    convert.export(jax.eval_shape(lambda: make_transnormer(**change)), tmp_path / "x")
  assert not list(tmp_path.iterdir())
