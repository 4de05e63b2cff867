"""Tokenizers of images from published files or from workdirs, and what tells one from another."""

from collections.abc import Sequence
import dataclasses
import hashlib
import os
from typing import Any

import jax
from jax import P
from jax import numpy as jnp
import numpy as np

from research import paths, runs
from research.errors import check
from research.kernels.dispatch import place, reshape_rows
from research.mesh import BATCH
from research.models import convert
from research.models.vq import VQ
from research.models.vqvae import VQVAE
from research.nn.conv import IMAGES


def load(path: str | os.PathLike, run: str | None = None, scales: Sequence[int] | None = None) -> VQ | VQVAE:
  """The tokenizer of published weights, or of a workdir's run ("ARM-SEED"; None: the only one), on the current mesh.

  scales: of published weights of VAR's tokenizer that are not those for 256 pixels and say nothing of it. Raises
  UserError.
  """
  if convert.is_weights(path):
    check(run is None, "run", run, "goes with a workdir")
    weights = convert.read(path, {"v_patch_nums": list(scales)} if scales else None)
    fix = f"is a {weights.family.name}; give the tokenizer's weights"
    check(weights.family.make in (VQ, VQVAE), "tokenizer", path, fix)
    return convert.load(weights, precision="float32")[1]
  fix = "no such file or directory; give weights, or the workdir of a run"
  check(paths.parse(path, "tokenizer").is_dir(), "tokenizer", path, fix)
  model = runs.load(path, run)[1]
  found = getattr(model, "tokenizer", model)  # as it is trained, with more beside it
  fix = f"holds a {type(model).__name__}; give the run that trained a tokenizer"
  check(isinstance(found, VQ | VQVAE), "tokenizer", path, fix)
  return found


def identity(tokenizer: VQ | VQVAE) -> dict[str, Any]:
  """What its codes mean: JSON with its kind, the sizes that a model of codes must have, and a hash of all else."""
  cfg = tokenizer.cfg
  content = hashlib.sha256(repr(sorted(dataclasses.asdict(cfg).items())).encode())
  for path, x in sorted(jax.tree_util.tree_leaves_with_path(tokenizer), key=lambda leaf: jax.tree_util.keystr(leaf[0])):
    content.update(f"{jax.tree_util.keystr(path)} {x.shape}".encode())
    content.update(np.ascontiguousarray(jax.device_get(x), np.float32).tobytes())
  about = {"kind": _KINDS[type(tokenizer)], "vocab": cfg.vocab, "code_width": cfg.code_width}
  about |= {"scales": list(cfg.scales)} if isinstance(tokenizer, VQVAE) else {}
  return about | {"sha256": content.hexdigest()}


_KINDS = {VQ: "VQ", VQVAE: "VQVAE"}


def tokens(tokenizer: VQ | VQVAE, size: int) -> int:
  """Codes of an image of size x size pixels. Raises UserError where it cannot be encoded."""
  cfg = tokenizer.cfg
  cfg.check_image((1, size, size, cfg.image_channels))
  return cfg.tokens if isinstance(tokenizer, VQVAE) else (size // cfg.downsample) ** 2


_SIGNED = (np.arange(256) / 127.5 - 1).astype(np.float32)  # rounded once, as where the host computes it


@jax.jit
def encode_pixels(tokenizer: VQ | VQVAE, pixels: jax.Array) -> jax.Array:
  """Images uint8 [batch, size, size, channels] -> codes int32 [batch, tokens]."""
  return encode(tokenizer, jnp.asarray(_SIGNED).at[place(pixels, IMAGES)].get(out_sharding=IMAGES))


@jax.jit
def encode(tokenizer: VQ | VQVAE, images: jax.Array) -> jax.Array:
  """Images float32 [batch, size, size, channels] in [-1, 1] -> codes int32 [batch, tokens]."""
  with jax.default_matmul_precision("highest"):  # else a TPU or a GPU rounds, and near ties fall otherwise
    codes = tokenizer.encode(images)
  return codes if codes.ndim == 2 else reshape_rows(codes, codes.shape[1] * codes.shape[2])


@jax.jit
def decode(tokenizer: VQ | VQVAE, codes: jax.Array) -> jax.Array:
  """Codes int32 [batch, tokens] of square images -> float32 images in [-1, 1]."""
  if isinstance(tokenizer, VQVAE):
    return tokenizer.decode_codes(codes)
  side = round(codes.shape[1] ** 0.5)
  return tokenizer.decode_codes(reshape_rows(place(codes, P(BATCH, None)), side, side))
