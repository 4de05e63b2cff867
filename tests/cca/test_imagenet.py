"""The commands of the ImageNet runs, one after the other, on small pictures and the tiny weights of the goldens."""

import json
import math
import pathlib
import sys

import jax
import numpy as np
from PIL import Image
import pytest

from experiments.cca import stages
from experiments.cca.__main__ import build, report
from research import config, image_tokenizers, optim, run, writers
from research.errors import UserError
from research.tools import codes, export, sample
from tests import small
from tests.models.images import manifest, traced

ROOT = pathlib.Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "models" / "goldens" / "images"
CONFIG = "experiments/cca/configs/imagenet.py"
# the option of the config, the released layout of model and tokenizer
BACKBONES = {
  "llamagen": ("llamagen_l", GOLDENS / "llamagen_gpt_mha" / "c2i_tiny.pt", GOLDENS / "llamagen_vq"),
  "var": ("var_d20", GOLDENS / "var_l2norm" / "weights.safetensors", GOLDENS / "var_vqvae" / "vae_tiny.pth"),
}
LAM = {"llamagen": 300, "var": 50}
slow_var = pytest.mark.parametrize("backbone", ["llamagen", pytest.param("var", marks=pytest.mark.slow)])


def command(main, *argv):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "argv", ["command", *map(str, argv)])
    main()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """Ten classes of pictures of 12 x 12."""
  root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
  for split, count in (("train", 24), ("val", 8)):
    for i in range(count):
      path = root / split / str(i % 10) / f"{i}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).save(path)
  return root


@pytest.fixture(scope="module")
def extracted(pictures, tmp_path_factory):
  """The codes of a backbone, made once."""
  made = {}

  def make(backbone):
    if backbone not in made:
      made[backbone] = tmp_path_factory.mktemp(backbone)
      given = ["--source", f"folder:{pictures}", "--tokenizer", BACKBONES[backbone][2], "--size=8", "--batch=5"]
      scales = ["--scales=1,2,3,4"] if backbone == "var" else []
      command(codes.main, *given, *scales, "--resize=1.25", "--views=five", f"--out={made[backbone]}")
    return made[backbone]

  return make


def settings(backbone, extracted, *more):
  option, model, tokenizer = BACKBONES[backbone]
  fields = {"init_from": model, "codes.source": f"codes:{extracted(backbone)}", "only": "cca", "steps": 3}
  fields |= {"eval_every": 0, "codes.tokenizer": tokenizer} if backbone == "var" else {"eval_every": 0}
  return f"{CONFIG}:{option},tiny", [*(f"{name}={value}" for name, value in fields.items()), *more]


@slow_var
def test_the_commands_lead_from_pictures_and_released_weights_to_samples(backbone, extracted, tmp_path):
  spec, overrides = settings(backbone, extracted)
  workdir, tokenizer = tmp_path / "run", ["--tokenizer", BACKBONES[backbone][2]]
  command(
    lambda: run.main(build, report), f"--config={spec}", f"--workdir={workdir}", *(f"--config.{o}" for o in overrides)
  )
  lines = writers.read(workdir / "metrics.jsonl")
  first = next(r for r in lines if r["kind"] == "train")
  at_start = math.log(2) * (1 + LAM[backbone]) / LAM[backbone]
  assert abs(first["loss_at_start"] - at_start) < 0.9  # some labels collide
  assert [r for r in lines if r["kind"] == "eval"][-1]["drift"] > 0
  about = json.loads((workdir / "manifest.json").read_text())["data"]["cca"]
  assert about["images"] == {"train": 24, "validation": 8}
  assert about["views"] == {"train": 5, "validation": 1}
  assert (workdir / "report" / "rewards.png").is_file()

  how = ["--labels=3,1,10,0", "--scale=1.5", "--top_k=9", "--batch=4", "--seed=2", *tokenizer]
  ours, theirs, grid = tmp_path / "ours.npz", tmp_path / "theirs.npz", tmp_path / "grid.png"
  command(sample.main, "--workdir", workdir, *how, f"--out={ours}", f"--grid={grid}", "--columns=2")
  command(export.main, "--workdir", workdir, f"--out={tmp_path / 'weights'}")
  command(sample.main, "--weights", tmp_path / "weights", *how, f"--out={theirs}")
  made, again = np.load(ours), np.load(theirs)
  assert (made["arr_0"].shape, made["arr_0"].dtype) == ((4, 8, 8, 3), np.uint8)
  assert made["labels"].tolist() == [3, 1, 10, 0]
  assert (made["codes"] == again["codes"]).all()
  told = json.loads(str(made["settings"]))
  assert {name: told[name] for name in ("scale", "top_k", "seed", "backbone")} == {
    "scale": 1.5,
    "top_k": 9,
    "seed": 2,
    "backbone": backbone,
  }
  assert Image.open(grid).size == (2 * 64 + 8, 2 * 64 + 8)


def prepared(backbone, extracted, *more):
  spec, overrides = settings(backbone, extracted, *more)
  _, single = config.expand(config.load(spec, overrides))[0]
  mesh, exp = run.prepare(build, single)
  run.start_points(single, "cca", mesh, exp, None, ["cca"])
  return mesh, exp


@pytest.mark.parametrize(
  ("more", "words"),
  [
    (["codes.source=codes:/nowhere"], "codes.source=codes:/nowhere: there is no such directory"),
    (["codes.source=/nowhere"], "write codes:DIR"),
    (["init_from="], "init_from='': name the model to tune"),
    (["tune.method=ddo", "init_from=arm:model"], "tune.method=ddo"),
    (["llamagen.classes=9"], "llamagen.classes=9: .*was written with 10"),
    (["vq.vocab=32", "llamagen.vocab=32"], "llamagen.vocab=32: .*was written with 64"),
    (["llamagen.layers=3"], "(?s)are of another model than this run's.*model.layers.*2.*3"),
    (["batch=16"], "has 8 images for validation"),
    ([f"init_from={GOLDENS / 'var_l2norm' / 'weights.safetensors'}"], "(?s)of another model.*absent"),
  ],
)
def test_a_wrong_setting_is_told_before_anything_is_compiled(more, words, extracted):
  with pytest.raises(UserError, match=words):
    prepared("llamagen", extracted, *more)


@pytest.mark.parametrize(
  ("more", "words"),
  [
    (["codes.tokenizer="], "VAR reads what its tokenizer makes of codes"),
    ([f"codes.tokenizer={GOLDENS / 'llamagen_vq'}"], "is not the one that .* was written with: its sha256 is"),
    (["backbone=llamagen", "length=16"], "holds codes of a VQVAE; llamagen has those of a VQ"),
  ],
)
def test_codes_of_another_tokenizer_are_told(more, words, extracted):
  with pytest.raises(UserError, match=words):
    prepared("var", extracted, *more)


def test_var_reads_what_its_tokenizer_makes_of_the_codes(extracted):
  mesh, exp = prepared("var", extracted)
  with jax.set_mesh(mesh):
    batch = next(iter(exp.data("validation")))
  with small.use():
    tokenizer = image_tokenizers.load(BACKBONES["var"][2], scales=(1, 2, 3, 4))
    np.testing.assert_allclose(batch["inputs"], jax.jit(lambda t, x: t.inputs(x))(tokenizer, batch["codes"]), atol=1e-6)
  assert {name: x.shape for name, x in batch.items()} == {name: x.shape for name, x in exp.batch().items()}


@pytest.mark.parametrize(
  ("option", "name"),
  [
    ("llamagen_b", "GPT-B_block576"),
    ("llamagen_l", "GPT-L_block576"),
    ("llamagen_xl", "GPT-XL_block576"),
    ("llamagen_xxl", "GPT-XXL_block576"),
    ("llamagen_3b", "GPT-3B_block576"),
    ("var_d16", "var_d16"),
    ("var_d20", "var_d20"),
    ("var_d24", "var_d24"),
    ("var_d30", "var_d30"),
  ],
)
def test_models_have_the_released_number_of_parameters(option, name):
  cfg = config.load(f"{CONFIG}:{option}")
  make = stages.MODELS[cfg.backbone][0]
  wanted = manifest(cfg.backbone)[name]["n_params"]
  assert traced(lambda key: make(key, cfg.model, "fsdp"), data=64, model=1)[1] == wanted


def test_the_settings_are_those_of_the_papers_table():
  rows = {}
  for option in ("llamagen_b", "llamagen_l", "llamagen_3b", "var_d16", "var_d24", "var_d30"):
    cfg = config.load(f"{CONFIG}:{option}")
    rows[option] = (cfg.tune.beta, cfg.tune.lam, cfg.tx.lr, cfg.tune.dropout, cfg.batch, cfg.steps, cfg.tx.clip)
  assert rows == {
    "llamagen_b": (0.02, 1000.0, 1e-5, True, 256, 5004, 1.0),
    "llamagen_l": (0.02, 300.0, 1e-5, True, 256, 5004, 1.0),
    "llamagen_3b": (0.02, 500.0, 1e-5, True, 256, 5004, 1.0),
    "var_d16": (0.02, 50.0, 2e-5, False, 256, 5004, 2.0),
    "var_d24": (0.02, 100.0, 2e-5, True, 256, 5004, 2.0),
    "var_d30": (0.02, 1000.0, 2e-5, True, 256, 5004, 2.0),
  }


def test_the_learning_rate_of_var_warms_up_holds_and_falls_to_its_end():
  cfg = config.load(f"{CONFIG}:var_d24")
  lr = optim.schedule(cfg.tx, cfg.steps)
  shares = [float(lr(step)) / 2e-5 for step in (99, 250, 2627, 5004)]
  assert shares == pytest.approx([1, 1, 0.505, 0.01], abs=1e-3)
