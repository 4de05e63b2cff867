"""Images are drawn as the released code draws them: its filters, its guidance, its greedy codes."""

import json

import jax
from matplotlib.image import imread
import numpy as np
import pytest

from research.errors import UserError
from research.generation import Sampling, filtered
from research.image_generation import llamagen_tokens, var_images
from research.mesh import MeshConfig
from research.models.llamagen import LlamaGen
from research.models.vqvae import VQVAE, VQVAEConfig
from research.report import image_grid
from tests import small
from tests.models import test_llamagen, test_var
from tests.models.images import GOLDENS, expected, load

GREEDY = Sampling(temperature=0)


@pytest.mark.parametrize("name", ["sampling_filter_llamagen", "sampling_filter_var"])
def test_filters_leave_the_tokens_and_probabilities_of_the_released_code(name):
  wanted, said = np.load(GOLDENS / f"{name}.npz"), json.loads((GOLDENS / f"{name}.json").read_text())
  combinations = said.get("combos_topk_topp_temperature", said.get("combos_topk_topp"))
  logits = wanted["logits"].reshape(-1, 24)
  for i, (top_k, top_p, *temperature) in enumerate(combinations):
    # VAR's code says 0 for "no top_p"
    out = filtered(logits, Sampling(*temperature or (1.0,), top_k=top_k, top_p=top_p or 1.0))
    np.testing.assert_allclose(jax.nn.softmax(out), wanted[f"probs_{i}"].reshape(-1, 24), atol=1e-6)
    np.testing.assert_array_equal(np.isfinite(out), wanted[f"support_{i}"].reshape(-1, 24))


def test_llamagens_greedy_codes_are_the_released_codes():
  wanted = expected("llamagen_gpt_mha")
  with small.use():
    model, labels = load("llamagen_gpt_mha", layer_loop="scan"), wanted["decode_class_ids"]
    for name, settings in {
      "greedy_cfg_1": {},
      "greedy_cfg_2": {"guidance": 2.0},
      "greedy_cfg_2_interval_4": {"guidance": 2.0, "interval": 4},
    }.items():
      made = llamagen_tokens(model, labels, sampling=GREEDY, **settings)
      np.testing.assert_array_equal(made, wanted[name], err_msg=name)


def test_llamagens_greedy_codes_with_grouped_queries_are_the_released_codes():
  wanted = expected("llamagen_gpt_gqa")
  with small.use():
    model = load("llamagen_gpt_gqa", layer_loop="scan")
    for name in (key for key in wanted if key.startswith("greedy_cfg_")):
      scale, *interval = name.removeprefix("greedy_cfg_").split("_interval_")
      settings = {"guidance": float(scale.split("_")[0])} | ({"interval": int(interval[0])} if interval else {})
      made = llamagen_tokens(model, wanted["decode_class_ids"], sampling=GREEDY, **settings)
      np.testing.assert_array_equal(made, wanted[name], err_msg=name)


@pytest.mark.parametrize("name", ["var_l2norm", "var_saln_nol2norm"])
def test_vars_greedy_codes_and_images_are_the_released_codes(name):
  wanted = expected(name)
  labels = wanted["infer_label_B"]
  with small.use():
    model, tokenizer = load(name, layer_loop="scan"), load("var_vqvae")
    logits = jax.jit(lambda model, *x: model.logits(*x))
    for scale in (0, 1.5):
      prefix = f"infer_cfg_{scale}"
      codes, images = var_images(model, tokenizer, labels, guidance=scale, sampling=GREEDY)
      np.testing.assert_array_equal(codes, wanted[f"{prefix}_idx_BL"])
      np.testing.assert_allclose((images.transpose(0, 3, 1, 2) + 1) / 2, wanted[f"{prefix}_img01"], atol=1e-4)
      f_hat = tokenizer.partial(codes)[-1].transpose(0, 3, 1, 2)
      np.testing.assert_allclose(f_hat, wanted[f"{prefix}_f_hat"], atol=1e-4)
      inputs = tokenizer.inputs(codes)
      cond, null = (logits(model, inputs, x) for x in (labels, np.full_like(labels, model.cfg.classes)))
      t = scale * model.cfg.levels[:, None] / 3
      np.testing.assert_allclose((1 + t) * cond - t * null, wanted[f"{prefix}_logits_after_cfg"], atol=5e-4)


def test_what_a_row_gets_depends_on_the_seed_and_its_place_only():
  with small.use():
    model = test_llamagen.random_model()
    labels = [3, 0, 5, 6]
    made = llamagen_tokens(model, labels, guidance=1.5, seed=3)
  with small.use(MeshConfig(1, 2, 2), devices=4):
    again = llamagen_tokens(test_llamagen.random_model(), [3, 0, 5], guidance=1.5, seed=3)
  np.testing.assert_array_equal(again, made[:3])
  assert made.shape == (4, 16)
  assert len(np.unique(made)) > 8


def test_the_filters_and_the_seed_reach_the_sampling():
  with small.use():
    model = test_llamagen.random_model()
    draw = lambda seed=0, **x: llamagen_tokens(model, [2, 2], sampling=Sampling(**x), seed=seed)
    np.testing.assert_array_equal(draw(top_k=1), llamagen_tokens(model, [2, 2], sampling=GREEDY))
    assert (draw(seed=1) != draw()).any()


def test_classes_and_tokenizers_that_do_not_fit_are_told_in_one_line():
  with small.use():
    model = jax.eval_shape(lambda: LlamaGen(jax.random.key(0), test_llamagen.MODEL))
    for labels, told in (([7], r"labels=\[7\]: classes lie in 0 .. 5"), ([-1], r"labels=\[-1\]"), ([], "give a list")):
      with pytest.raises(UserError, match=told):
        llamagen_tokens(model, labels)
    with pytest.raises(UserError, match="guidance=0.5: use 1"):
      llamagen_tokens(model, [1], guidance=0.5)
    tokenizer = load("var_vqvae")
    abstract = lambda **changes: jax.eval_shape(lambda: test_var.VAR(jax.random.key(0), test_var.varied(**changes)))
    with pytest.raises(UserError, match=r"tokenizer.scales=\(1, 2, 3, 4\): must be the model's, \(1, 2, 3\)"):
      var_images(abstract(), tokenizer, [1])
    with pytest.raises(UserError, match="tokenizer.vocab=32: must be the model's, 33"):
      var_images(abstract(scales=(1, 2, 3, 4), vocab=33), tokenizer, [1])


def test_a_grid_of_images_is_a_picture_with_every_image_in_its_place(tmp_path):
  images = np.linspace(-1, 1, 5)[:, None, None, None] * np.ones((5, 4, 6, 1))
  image_grid(tmp_path / "grid.png", images, columns=3, scale=2)
  picture = imread(tmp_path / "grid.png")[..., :3]
  assert picture.shape == (2 * 9, 2 * 20, 3)
  for i in range(5):
    row, column = divmod(i, 3)
    np.testing.assert_allclose(picture[10 * row + 3, 14 * column + 5], i / 4, atol=1 / 255)


@pytest.mark.parametrize("guidance", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_var_draws_on_four_devices_what_it_draws_on_one(guidance):
  sizes = {"vocab": 16, "code_width": 4, "scales": (1, 2, 4)}
  book = VQVAEConfig(**sizes, latent=4, channels=32, mult=(1, 1), blocks=1, image_channels=1)
  made = []
  for mesh, devices in ((None, 1), (MeshConfig(1, 2, 2), 4)):
    with small.use(mesh, devices):
      model = test_var.random_model(test_var.varied(**sizes))
      tokenizer = jax.jit(lambda key: VQVAE(key, book))(jax.random.key(0))
      made.append(var_images(model, tokenizer, [3, 0, 6], guidance=guidance, seed=2))
  np.testing.assert_array_equal(made[0][0], made[1][0])
  np.testing.assert_allclose(made[0][1], made[1][1], atol=1e-5)
  assert made[0][1].shape == (3, 8, 8, 1)
