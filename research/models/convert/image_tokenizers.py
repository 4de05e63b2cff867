"""The tokenizers of LlamaGen and VAR as their authors released them: a file of PyTorch's without a config.json.

Both hold the same convolutions under other names. The tensors say all sizes; a config.json beside
the file may say the rest, by the names of the released code: v_patch_nums and quant_resi, codebook_l2_norm.
"""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

import numpy as np

from research.errors import check
from research.models.convert.family import Family, Tensor, count
from research.models.convert.files import Stored
from research.models.convert.var import read_scales
from research.models.vq import VQ, ConvConfig, VQConfig
from research.models.vqvae import VQVAE, VQVAEConfig


@dataclasses.dataclass(frozen=True)
class _Names:
  """What a released code calls the parts of the encoder and the decoder."""

  down: str  # a level of the encoder, by its number
  up: str  # a level of the decoder
  up_reversed: bool  # whether the decoder's first level is its last number
  block: str
  middle: tuple[str, str, str]
  attention: dict[str, int]  # its matrices, and how many of q, k, v each is

  def up_name(self, i: int, levels: int) -> str:
    return self.up.format(levels - 1 - i if self.up_reversed else i)


_LLAMAGEN = _Names("conv_blocks.{}", "conv_blocks.{}", False, "res", ("0", "1", "2"), {"q": 1, "k": 1, "v": 1})
_VAR = _Names("down.{}", "up.{}", True, "block", ("block_1", "attn_1", "block_2"), {"qkv": 3})


def _infer(names: _Names, stored: Mapping[str, Stored]) -> dict[str, Any]:
  shape = {key: x.shape for key, x in stored.items()}
  kernel, book = shape.get("encoder.conv_in.weight", ()), shape.get("quantize.embedding.weight", ())
  if (len(kernel), len(book)) != (4, 2):
    return {}
  first = re.escape(f"encoder.{names.down}.{names.block}.0.conv1.weight").replace(r"\{\}", r"(\d+)")
  widths = {int(m[1]): shape[key][0] for key in shape if (m := re.fullmatch(first, key))}
  blocks = {key for key in shape if key.startswith(f"encoder.{names.down.format(0)}.{names.block}.")}
  said = {
    "ch": kernel[0],
    "image_channels": kernel[1],
    "ch_mult": [widths[i] // kernel[0] for i in sorted(widths)],
    "num_res_blocks": len({key.split(f".{names.block}.")[1].split(".")[0] for key in blocks}),
    "codebook_size": book[0],
    "codebook_embed_dim": book[1],
  }
  for name, key, axis in (("z_channels", "encoder.conv_out.weight", 0), ("quant_conv_ks", "quant_conv.weight", -1)):
    if key in shape:
      said[name] = shape[key][axis]
  phis = [key for key in shape if re.fullmatch(r"quantize\.quant_resi\.qresi(_ls\.\d+)?\.weight", key)]
  return said | ({"share_quant_resi": len(phis)} if phis else {})


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
  mult = config.get("ch_mult")
  ok = isinstance(mult, list) and mult and all(type(n) is int and n >= 1 for n in mult)
  check(bool(ok), "ch_mult", mult, "must be a list of whole numbers")
  return {
    "vocab": count(config, "codebook_size"),
    "code_width": count(config, "codebook_embed_dim"),
    "latent": count(config, "z_channels"),
    "channels": count(config, "ch"),
    "mult": tuple(mult),
    "blocks": count(config, "num_res_blocks"),
    "code_kernel": count(config, "quant_conv_ks"),
    "image_channels": count(config, "image_channels", 3),
  }


def _describe(cfg: ConvConfig) -> dict[str, Any]:
  return {
    "codebook_size": cfg.vocab,
    "codebook_embed_dim": cfg.code_width,
    "z_channels": cfg.latent,
    "ch": cfg.channels,
    "ch_mult": list(cfg.mult),
    "num_res_blocks": cfg.blocks,
    "quant_conv_ks": cfg.code_kernel,
    "image_channels": cfg.image_channels,
  }


def _tensors(cfg: ConvConfig, names: _Names) -> dict[str, Tensor]:
  """Those of the convolutions and the codebook; the files hold kernels as [out, in, height, width]."""
  found: dict[str, Tensor] = {}
  widths, levels = [cfg.channels * m for m in cfg.mult], len(cfg.mult)

  def conv(key, param, channels, to, size=3):
    found[f"{key}.weight"] = Tensor(f"{param}.kernel", (to, channels, size, size), axes=(2, 3, 1, 0))
    found[f"{key}.bias"] = Tensor(f"{param}.bias", (to,))

  def norm(key, param, channels):
    found[f"{key}.weight"] = Tensor(f"{param}.scale", (channels,))
    found[f"{key}.bias"] = Tensor(f"{param}.bias", (channels,))

  def block(key, param, channels, to):
    norm(f"{key}.norm1", f"{param}.norm1", channels)
    conv(f"{key}.conv1", f"{param}.conv1", channels, to)
    norm(f"{key}.norm2", f"{param}.norm2", to)
    conv(f"{key}.conv2", f"{param}.conv2", to, to)
    if channels != to:
      conv(f"{key}.nin_shortcut", f"{param}.shortcut", channels, to, 1)

  def attention(key, param, c):
    norm(f"{key}.norm", f"{param}.norm", c)
    at = 0
    for name, n in names.attention.items():
      weight = Tensor(f"{param}.qkv", (n * c, c, 1, 1), (n, c, c), (2, 0, 1), at=(1, at, at + n))
      found[f"{key}.{name}.weight"] = weight
      found[f"{key}.{name}.bias"] = Tensor(f"{param}.qkv_bias", (n * c,), (n, c), at=(0, at, at + n))
      at += n
    conv(f"{key}.proj_out", f"{param}.out", c, c, 1)

  def middle(side, c):
    for i, (name, part) in enumerate(zip(names.middle, (block, attention, block), strict=True)):
      part(f"{side}.mid.{name}", f"{side}.middle.{i}", *((c,) if part is attention else (c, c)))

  def level(side, i, name, channels, to, blocks, lowest, resample):
    key, param = f"{side}.{name}", f"{side}.levels.{i}"
    for j in range(blocks):
      block(f"{key}.{names.block}.{j}", f"{param}.res.{j}", channels if j == 0 else to, to)
      if lowest:
        attention(f"{key}.attn.{j}", f"{param}.attention.{j}", to)
    if resample:
      conv(f"{key}.{resample}.conv", f"{param}.conv", to, to)

  conv("encoder.conv_in", "encoder.conv_in", cfg.image_channels, cfg.channels)
  for i, (channels, to) in enumerate(zip([cfg.channels, *widths], widths, strict=False)):
    last = i == levels - 1
    level("encoder", i, names.down.format(i), channels, to, cfg.blocks, last, None if last else "downsample")
  middle("encoder", widths[-1])
  norm("encoder.norm_out", "encoder.norm_out", widths[-1])
  conv("encoder.conv_out", "encoder.conv_out", widths[-1], cfg.latent)
  conv("decoder.conv_in", "decoder.conv_in", cfg.latent, widths[-1])
  middle("decoder", widths[-1])
  for i, (channels, to) in enumerate(zip([widths[-1], *widths[::-1]], widths[::-1], strict=False)):
    resample = None if i == levels - 1 else "upsample"
    level("decoder", i, names.up_name(i, levels), channels, to, cfg.blocks + 1, i == 0, resample)
  norm("decoder.norm_out", "decoder.norm_out", widths[0])
  conv("decoder.conv_out", "decoder.conv_out", widths[0], cfg.image_channels)
  found["quantize.embedding.weight"] = Tensor("codebook", (cfg.vocab, cfg.code_width))
  conv("quant_conv", "to_code", cfg.latent, cfg.code_width, cfg.code_kernel)
  conv("post_quant_conv", "from_code", cfg.code_width, cfg.latent, cfg.code_kernel)
  return found


def _vq_settings(config: Mapping[str, Any]) -> dict[str, Any]:
  mult = config.get("encoder_ch_mult", config.get("ch_mult"))
  same = config.get("decoder_ch_mult", mult)
  check(same == mult, "decoder_ch_mult", same, f"must be the encoder's, {mult}")
  return _sizes({**config, "ch_mult": mult}) | {"l2_norm": bool(config.get("codebook_l2_norm", True))}


def _vqvae_settings(config: Mapping[str, Any]) -> dict[str, Any]:
  check(not config.get("using_znorm"), "using_znorm", config.get("using_znorm"), "only false can be read")
  book = {"codebook_size": config.get("vocab_size", config.get("codebook_size"))}
  return _sizes({**config, **book}) | {
    "scales": read_scales(config, "v_patch_nums"),
    "phis": count(config, "share_quant_resi", 4),
    "phi_ratio": float(config.get("quant_resi", 0.5)),
  }


def _vqvae_tensors(cfg: VQVAEConfig, config: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
  del config
  found = _tensors(cfg, _VAR)
  for i in range(cfg.phis):
    key = f"quantize.quant_resi.{'qresi' if cfg.phis == 1 else f'qresi_ls.{i}'}"
    shape = (cfg.code_width, cfg.code_width, 3, 3)
    found[f"{key}.weight"] = Tensor(f"phis.{i}.kernel", shape, axes=(2, 3, 1, 0))
    found[f"{key}.bias"] = Tensor(f"phis.{i}.bias", (cfg.code_width,))
  return found


VQ_FAMILY = Family(
  name="llamagen_vq",
  reads=lambda config, keys: (
    config.get("model_type") == "llamagen_vq" or {"encoder.mid.0.conv1.weight", "quantize.embedding.weight"} <= keys
  ),
  settings=_vq_settings,
  tensors=lambda cfg, config=None: _tensors(cfg, _LLAMAGEN),
  make=VQ,
  writes=lambda model: isinstance(model, VQ),
  describe=lambda cfg: {"model_type": "llamagen_vq", **_describe(cfg), "codebook_l2_norm": cfg.l2_norm},
  Config=VQConfig,
  images=True,
  infer=lambda stored: _infer(_LLAMAGEN, stored),
  buffers=lambda cfg: {"quantize.codebook_used": np.zeros(65536, np.float32)},  # statistics of its training
)

VQVAE_FAMILY = Family(
  name="var_vqvae",
  reads=lambda config, keys: (
    config.get("model_type") == "var_vqvae" or {"encoder.mid.block_1.conv1.weight", "quantize.embedding.weight"} <= keys
  ),
  settings=_vqvae_settings,
  tensors=_vqvae_tensors,
  make=VQVAE,
  writes=lambda model: isinstance(model, VQVAE),
  describe=lambda cfg: {
    "model_type": "var_vqvae",
    **_describe(cfg),
    "v_patch_nums": list(cfg.scales),
    "share_quant_resi": cfg.phis,
    "quant_resi": cfg.phi_ratio,
  },
  Config=VQVAEConfig,
  images=True,
  infer=lambda stored: _infer(_VAR, stored),
  buffers=lambda cfg: {"quantize.ema_vocab_hit_SV": np.zeros((len(cfg.scales), cfg.vocab), np.float32)},
)
