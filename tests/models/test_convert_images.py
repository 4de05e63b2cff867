"""Released models of images come in from every file they were saved in, go out as they came, or are refused whole."""

import argparse
import json
import pathlib
import shutil
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from research.errors import UserError
from research.models import convert
from research.tools import models
from tests import small
from tests.models.images import GOLDENS

CASES = {
  "llamagen_gpt_mha": "llamagen",
  "llamagen_gpt_gqa": "llamagen",
  "var_l2norm": "var",
  "var_saln_nol2norm": "var",
  "llamagen_vq": "llamagen_vq",
  "var_vqvae": "var_vqvae",
}
STATISTICS = ("quantize.codebook_used", "quantize.ema_vocab_hit_SV")  # of training: written as zeros
VAR_FILE, GPT_FILE = (
  GOLDENS / "var_saln_nol2norm" / "var_tiny.pth",
  GOLDENS / "llamagen_gpt_gqa" / "c2i_XXL_tiny_flat.pt",
)


def stored(path, **more):
  return {key: x.view() for key, x in convert.files.open_tensors(pathlib.Path(path), **more).items()}


def nested(source, path, change):
  """A copy of a PyTorch file whose pickle is `change(what it was)`."""
  with zipfile.ZipFile(source) as file, zipfile.ZipFile(path, "w") as out:
    for info in file.infolist():
      data = file.read(info)
      out.writestr(info.filename, change(data) if info.filename.endswith("/data.pkl") else data)
  return path


def name(text):
  return b"X" + len(text).to_bytes(4, "little") + text.encode()


def under(*names, beside=b""):
  """The dictionary of a pickle under these names, with `beside` in the outermost dictionary."""

  def change(program):
    body = program[2:-1]  # without the protocol and the end
    for key in reversed(names[1:]):
      body = b"}(" + name(key) + body + b"u"
    return b"\x80\x02}(" + beside + name(names[0]) + body + b"u."

  return change


EPOCH = name("epoch") + b"K\x03"
ARGS = name("args") + b"cargparse\nNamespace\n)\x81}" + name("lr") + b"G\x3f\x00\x00\x00\x00\x00\x00\x00sb"
NONE = name("optimizer") + b"}(" + name("state") + b"}" + name("betas") + b"]Nau"


@pytest.mark.parametrize("case", CASES)
def test_a_released_file_comes_back_from_its_export(case, tmp_path):
  weights = convert.read(GOLDENS / case)
  assert weights.family.name == CASES[case]
  (source,) = (p for p in (GOLDENS / case).iterdir() if p.suffix in (".safetensors", ".pt", ".pth"))
  before = load_file(source) if source.suffix == ".safetensors" else stored(source)
  with small.use():
    cfg, model = convert.load(weights, precision="float32")
    convert.export(model, tmp_path / "out")
    again = convert.read(tmp_path / "out")
  assert (again.family.name, again.settings) == (weights.family.name, weights.settings)
  after = load_file(tmp_path / "out" / "model.safetensors")
  assert after.keys() == before.keys() - {"freqs_cis"}
  for key, x in after.items():
    if key not in STATISTICS:
      assert x.dtype == before[key].dtype
      np.testing.assert_array_equal(x, before[key], err_msg=key)


@pytest.mark.parametrize("case", CASES)
def test_the_tools_for_text_refuse_a_model_of_images(case):
  args = argparse.Namespace(workdir=None, run=None, weights=str(GOLDENS / case), tokenizer=None)
  with pytest.raises(UserError, match=f"is a {CASES[case]}: it knows images, and this tool works on text"):
    models.open_model(args, [])


@pytest.mark.parametrize("case", ["llamagen_gpt_gqa", "var_l2norm", "llamagen_vq"])
def test_files_say_their_sizes_without_a_config(case, tmp_path):
  told = convert.read(GOLDENS / case)
  (file,) = (p for p in (GOLDENS / case).iterdir() if p.suffix in (".safetensors", ".pt", ".pth"))
  assert convert.read(file).settings == told.settings
  shutil.copy(file, tmp_path)
  assert convert.read(tmp_path).settings == told.settings


def test_what_a_file_does_not_say_is_asked_for_in_one_line():
  with pytest.raises(UserError, match=r"c2i_tiny.pt: n_head=None: must be a whole number"):
    convert.read(GOLDENS / "llamagen_gpt_mha" / "c2i_tiny.pt")
  settings = {"n_head": 4, "block_size": 16}
  assert convert.read(GOLDENS / "llamagen_gpt_mha" / "c2i_tiny.pt", settings).settings["heads"] == 4


@pytest.mark.parametrize(
  ("source", "change"),
  [
    (GPT_FILE, under("model")),
    (GPT_FILE, under("module")),
    (GPT_FILE, under("state_dict", beside=EPOCH)),
    (GPT_FILE, under("model", beside=EPOCH + NONE + ARGS)),
    (VAR_FILE, under("trainer", beside=EPOCH + ARGS)),  # CCA's
    (VAR_FILE, under("trainer", "var_wo_ddp", beside=EPOCH)),  # VAR's
  ],
)
def test_every_nesting_of_a_checkpoint_is_opened(source, change, tmp_path):
  file = nested(source, tmp_path / f"x{source.suffix}", change)
  ours, theirs = stored(file), stored(source)
  assert ours.keys() == theirs.keys()
  for key, x in theirs.items():
    np.testing.assert_array_equal(ours[key], x)


def test_the_tokenizer_in_a_checkpoint_of_vars_trainer_is_found_by_its_name(tmp_path):
  source = GOLDENS / "var_vqvae" / "vae_tiny.pth"
  file = nested(source, tmp_path / "x.pth", under("trainer", "vae_local", beside=EPOCH))
  weights = convert.read(file, {"v_patch_nums": [1, 2, 3, 4]}, member="trainer.vae_local")
  assert weights.settings == convert.read(GOLDENS / "var_vqvae").settings
  with pytest.raises(UserError, match="must hold a dictionary of tensors by name and nothing else at member=trainer.x"):
    convert.read(file, member="trainer.x")
  with pytest.raises(UserError, match="member=a: weights.safetensors has none"):
    convert.read(GOLDENS / "var_l2norm" / "weights.safetensors", member="a")


def test_a_nested_pickle_that_calls_anything_else_is_not_run(tmp_path):
  mark = tmp_path / "ran"
  call = name("args") + b"cos\nsystem\n" + name(f"touch {mark}") + b"\x85R"
  file = nested(GPT_FILE, tmp_path / "x.pt", under("model", beside=call))
  with pytest.raises(UserError, match=r"x.pt: calls os.system, which tensors have no need of"):
    convert.read(file)
  with pytest.raises(UserError, match="must hold a dictionary of tensors"):
    convert.read(nested(GPT_FILE, tmp_path / "y.pt", under("weights")))
  assert not mark.exists()


@pytest.mark.parametrize(
  ("case", "missing", "misshapen"),
  [
    ("llamagen_gpt_gqa", "layers.1.attention.wqkv.weight", "output.weight"),
    ("var_l2norm", "blocks.1.attn.v_bias", "lvl_embed.weight"),
    ("var_vqvae", "quantize.quant_resi.qresi_ls.3.bias", "post_quant_conv.weight"),
    ("llamagen_vq", "decoder.conv_blocks.0.attn.1.k.weight", "encoder.conv_out.bias"),
  ],
)
def test_every_difference_is_a_row_of_one_table_and_nothing_is_loaded(case, missing, misshapen, tmp_path):
  (source,) = (p for p in (GOLDENS / case).iterdir() if p.suffix in (".safetensors", ".pt", ".pth"))
  held = load_file(source) if source.suffix == ".safetensors" else stored(source)
  held = {key: np.array(x) for key, x in held.items() if key != missing}
  held |= {misshapen: held[misshapen][:-1], "more.weight": np.zeros(3, np.float32)}
  save_file(held, tmp_path / "model.safetensors")
  config = json.loads((GOLDENS / case / "config.json").read_text())
  if "block_size" in config:
    config |= {"vocab_size": 32}
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError) as e:
    convert.load(tmp_path)
  lines = str(e.value).splitlines()
  rows = {line.split(" ")[1]: line for line in lines if line.startswith("| ")}
  assert rows.keys() == {"key", missing, misshapen, "more.weight"}
  assert "absent" in rows[missing]
  assert rows["more.weight"].rstrip(" |").endswith("absent")
  assert f"are not those of a {CASES[case]} model" in lines[0]


@pytest.mark.parametrize(
  ("case", "settings", "told"),
  [
    ("llamagen_gpt_mha", {"model_type": "t2i"}, "model_type=t2i: only class-conditional"),
    ("llamagen_gpt_mha", {"n_head": 3}, "dim=64: must be a multiple of n_head=3"),
    ("llamagen_gpt_mha", {"block_size": 15}, "tokens=15: must be a square"),
    ("var_l2norm", {"patch_nums": "1_2"}, "patch_nums=1_2: must be a list"),
    ("var_vqvae", {"using_znorm": True}, "using_znorm=True: only false"),
    ("llamagen_vq", {"decoder_ch_mult": [1, 1]}, "decoder_ch_mult=.*: must be the encoder's"),
  ],
)
def test_what_this_importer_does_not_know_is_told_in_one_line(case, settings, told):
  with pytest.raises(UserError, match=told) as e:
    convert.read(GOLDENS / case, settings)
  assert len(str(e.value).splitlines()) == 1
