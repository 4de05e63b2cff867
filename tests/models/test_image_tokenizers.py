"""The tokenizers of images have the released code's numbers: codes, images, losses and their gradients."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models import convert, vq, vqvae
from research.models.convert import image_tokenizers
from research.models.vq import VQ, VQConfig
from research.models.vqvae import VQVAE, VQVAEConfig, phi_of_scale
from research.nn.resize import area_matrix, bicubic_matrix
from tests import small
from tests.models.images import GOLDENS, check_gradients, expected, load, manifest, traced


def nhwc(x):
  return x.transpose(0, 2, 3, 1)


def close(x, wanted, atol=1e-4):
  np.testing.assert_allclose(x, wanted, atol=atol)


# LlamaGen's


def test_llamagens_tokenizer_computes_what_the_released_code_computes():
  wanted = expected("llamagen_vq")
  with small.use():
    model = load("llamagen_vq")

    @jax.jit
    def run(model, images, codes):
      q = model.quantize(model.features(images))
      decode = lambda codes: model.decode(model.lookup(codes))
      return model.encoder(images), model.features(images), q, decode(q.codes), decode(codes), model.lookup(q.codes)

    codes = wanted["random_codes"].reshape(2, 8, 8)
    encoded, z, q, decoded, random, entries = run(model, nhwc(wanted["image"]), codes)
  close(encoded, nhwc(wanted["encoder_out"]))
  close(z, nhwc(wanted["pre_quant"]))
  np.testing.assert_array_equal(q.codes, wanted["indices"])
  close(q.features, nhwc(wanted["quant_st"]))
  close(entries, nhwc(wanted["codebook_entry_nchw"]))
  close(np.reshape(entries, (128, 8)), wanted["codebook_entry_flat"])
  close(decoded, nhwc(wanted["decoded"]))
  close(decoded, nhwc(wanted["decoded_from_codes"]))
  close(random, nhwc(wanted["random_codes_decoded"]))


def test_llamagens_losses_and_gradients_are_the_released_codes():
  wanted = expected("llamagen_vq")
  images = jnp.asarray(nhwc(wanted["image"]))
  with small.use():
    model = load("llamagen_vq", entropy=0.1)

    @jax.jit
    def run(model):
      def total(model):
        q = model.quantize(model.features(images))
        image = model.decode(q.features)
        parts = q.losses | {"reconstruction": jnp.mean(jnp.square(image - images))}
        return sum(parts.values()), (parts, image)

      return jax.value_and_grad(total, has_aux=True)(model)

    (total, (parts, image)), grads = run(model)
  close(image, nhwc(wanted["train_rec"]))
  names = {"codebook": "vq", "commitment": "commit", "entropy": "entropy_times_ratio", "reconstruction": "rec_l2"}
  for ours, theirs in names.items():
    np.testing.assert_allclose(parts[ours], wanted[f"loss_{theirs}"], rtol=1e-5, atol=1e-6, err_msg=ours)
  np.testing.assert_allclose(parts["entropy"] / 0.1, wanted["entropy_loss_raw_temperature_0.01"], rtol=1e-5)
  np.testing.assert_allclose(total, wanted["loss_total"], rtol=1e-5)
  check_gradients(grads, "llamagen_vq", wanted, "grad_total")


def test_without_l2_norm_codes_are_compared_as_they_are():
  wanted = expected("llamagen_quantizer_nol2")
  cfg = VQConfig(vocab=24, code_width=6, latent=32, channels=32, mult=(1,), blocks=1, l2_norm=False, entropy=0.2)
  z, upstream = jnp.asarray(nhwc(wanted["z_nchw"])), nhwc(wanted["upstream_cotangent"])
  with small.use():
    model = jax.jit(lambda key: VQ(key, cfg))(jax.random.key(0))
    model.codebook[...] = jnp.asarray(wanted["embedding.weight"])

    @jax.jit
    def run(model, z):
      def total(model, z):
        q = model.quantize(z)
        return jnp.sum(q.features * upstream) + sum(q.losses.values()), q

      return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(model, z)

    (_, q), (grads, grad_z) = run(model, z)
    close(model.lookup(q.codes), nhwc(wanted["entry_nchw"]), 1e-6)
  np.testing.assert_array_equal(q.codes, wanted["indices"])
  close(q.features, nhwc(wanted["z_q"]), 1e-5)
  for ours, theirs in {"codebook": "vq", "commitment": "commit", "entropy": "entropy_times_ratio"}.items():
    np.testing.assert_allclose(q.losses[ours], wanted[f"loss_{theirs}"], rtol=1e-5, atol=1e-6, err_msg=ours)
  for ours, theirs in ((grad_z, nhwc(wanted["grad_z"])), (grads.codebook[...], wanted["grad_embedding"])):
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max())


# VAR's


def test_vars_tokenizer_computes_what_the_released_code_computes():
  wanted = expected("var_vqvae")
  with small.use():
    model = load("var_vqvae")

    @jax.jit
    def run(model, images, codes):
      f = model.features(images)
      q = model.quantize(f)
      partial = model.partial(q.codes)
      maps = [partial[-1], partial[1], model.partial(codes)[-1]]
      image, coarse, _ = jnp.split(model.decode(jnp.concatenate(maps)), 3)
      clipped = model.decode_codes(codes), model.decode_codes(q.codes, scales=2)
      return f, q, partial, model.inputs(q.codes), image, coarse, model.inputs(codes), maps[2], clipped

    f, q, partial, inputs, image, coarse, random_inputs, random, (random_image, clipped) = run(
      model, nhwc(wanted["image"]), wanted["random_idx_BL"]
    )
  close(clipped, np.clip(coarse, -1, 1), 2e-5)
  close(f, nhwc(wanted["f_BChw"]))
  np.testing.assert_array_equal(q.codes, wanted["gt_BL"])
  for i in range(4):
    close(partial[i], nhwc(wanted[f"f_hat_scale{i}"]))
    close(q.partial[i], nhwc(wanted[f"f_hat_scale{i}"]))
  close(inputs, wanted["var_input_x_BLCv_wo_first_l"])
  close(image, nhwc(wanted["img_decoder_unclamped"]))
  close(np.clip(image, -1, 1), nhwc(wanted["img_from_last_fhat"]))
  close(np.clip(image, -1, 1), nhwc(wanted["idxBl_to_img_last"]))
  close(np.clip(coarse, -1, 1), nhwc(wanted["idxBl_to_img_scale1"]))
  close(random_inputs, wanted["random_var_input"])
  close(random, nhwc(wanted["random_fhat_final"]))
  close(random_image, nhwc(wanted["random_img"]))


def test_vars_losses_and_gradients_are_the_released_codes():
  wanted = expected("var_vqvae")
  images = jnp.asarray(nhwc(wanted["image"]))
  with small.use():
    model = load("var_vqvae")

    @jax.jit
    def run(model):
      def total(model):
        q = model.quantize(model.features(images))
        image, loss = model.decode(q.features), sum(q.losses.values())
        reconstruction = jnp.mean(jnp.square(image - images))
        return reconstruction + loss, (reconstruction, loss, image)

      return jax.grad(total, has_aux=True)(model)

    grads, (reconstruction, loss, image) = run(model)
  close(image, nhwc(wanted["train_rec"]))
  np.testing.assert_allclose(loss, wanted["train_vq_loss"], rtol=1e-5)
  np.testing.assert_allclose(reconstruction, wanted["train_rec_l2"], rtol=1e-5)
  check_gradients(grads, "var_vqvae", wanted, "grad_rec_plus_vq")


def test_maps_are_scaled_as_pytorch_scales_them():
  matrices = np.load(GOLDENS / "var_interpolation_matrices.npz")
  assert len(matrices) == 26
  for name, wanted in matrices.items():
    _, how, _, n, _, to = name.replace("/", "_").split("_")
    make = bicubic_matrix if how == "bicubic" else area_matrix
    np.testing.assert_allclose(make(int(n), int(to)), wanted, atol=1e-6, err_msg=name)


def test_ten_scales_share_the_four_phis_as_the_released_code_has_it():
  assert phi_of_scale(10, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
  assert phi_of_scale(4, 4) == [0, 1, 2, 3]
  assert phi_of_scale(5, 1) == [0] * 5


# Official sizes, and what does not fit


@pytest.mark.parametrize(
  ("name", "model", "cfg", "family"),
  [
    ("VQ-16", VQ, vq.OFFICIAL["VQ-16"], image_tokenizers.VQ_FAMILY),
    ("VQ-8", VQ, vq.OFFICIAL["VQ-8"], image_tokenizers.VQ_FAMILY),
    ("vae_ch160v4096z32", VQVAE, vqvae.OFFICIAL["vae_ch160v4096z32"], image_tokenizers.VQVAE_FAMILY),
  ],
  ids=lambda x: x if isinstance(x, str) else "",
)
def test_official_tokenizers_have_the_released_tensors(name, model, cfg, family):
  wanted = manifest("var" if name.startswith("vae") else "llamagen")[name]
  abstract, count = traced(lambda key: model(key, cfg))
  assert count == wanted["n_params"]
  shapes = {key: list(tensor.shape) for key, tensor in family.tensors(cfg, {}).items()}
  shapes |= {key: list(x.shape) for key, x in family.buffers(cfg).items()}
  assert shapes == {key: list(shape) for key, shape in wanted["state_dict"].items()}
  held = {convert._name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract)}
  assert {tensor.param for tensor in family.tensors(cfg, {}).values()} == held


@pytest.mark.parametrize(
  ("make", "told"),
  [
    (lambda: VQConfig(channels=48), "channels=48: must be a multiple of 32"),
    (lambda: VQConfig(code_kernel=2), "code_kernel=2"),
    (lambda: VQVAEConfig(scales=(1, 3, 2)), r"scales=\(1, 3, 2\): must be at least two sides that grow"),
    (lambda: VQVAEConfig(phi_ratio=2), "phi_ratio=2"),
    (lambda: VQConfig().check_image((1, 250, 256, 3)), "image=250x256: height and width must be multiples of 16"),
    (lambda: VQVAEConfig().check_image((1, 128, 128, 3)), "image=128x128: must be 256x256"),
    (lambda: VQConfig().check_image((1, 32, 32, 1)), "must have 3 channels"),
  ],
)
def test_what_does_not_fit_is_told_in_one_line(make, told):
  with pytest.raises(UserError, match=told):
    make()
