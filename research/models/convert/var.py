"""VAR as its authors released it: a file of PyTorch's without a config.json.

A config.json may stand beside it, with the arguments of the released code's constructor; the tensors say
them all for the released models.
"""

from collections.abc import Mapping
import math
from typing import Any

import numpy as np

from research.errors import check
from research.models.convert.family import Family, Tensor, count
from research.models.convert.files import Stored
from research.models.var import VAR, VARConfig

_SCALE = "blocks.0.attn.scale_mul_1H11"


def infer(stored: Mapping[str, Stored]) -> dict[str, Any]:
  """What the tensors say of the constructor's arguments; the scales stand in the buffer lvl_1L."""
  shape = {key: x.shape for key, x in stored.items()}
  if len(shape.get("word_embed.weight", ())) != 2:
    return {}
  width, code_width = shape["word_embed.weight"]
  said = {
    "depth": len({key.split(".")[1] for key in shape if key.startswith("blocks.")}),
    "embed_dim": width,
    "num_heads": shape[_SCALE][1] if _SCALE in shape else width // 64,
    "attn_l2_norm": _SCALE in shape,
    "shared_aln": "shared_ada_lin.1.weight" in shape,
    "Cvae": code_width,
  }
  if "head.weight" in shape:
    said["vocab_size"] = shape["head.weight"][0]
  if "class_emb.weight" in shape:
    said["num_classes"] = shape["class_emb.weight"][0] - 1
  if "blocks.0.ffn.fc1.weight" in shape:
    said["mlp_ratio"] = shape["blocks.0.ffn.fc1.weight"][0] / width
  if "lvl_1L" in stored and stored["lvl_1L"].dtype == "I64":
    said["patch_nums"] = [math.isqrt(n) for n in np.bincount(stored["lvl_1L"].view()[0]).tolist()]
  return said


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
  """The constructor's arguments -> fields of VARConfig. Raises UserError."""
  width = count(config, "embed_dim")
  return {
    "vocab": count(config, "vocab_size", 4096),
    "code_width": count(config, "Cvae", 32),
    "classes": count(config, "num_classes", 1000),
    "scales": read_scales(config, "patch_nums"),
    "width": width,
    "layers": count(config, "depth"),
    "heads": count(config, "num_heads"),
    "mlp_width": round(width * float(config.get("mlp_ratio", 4))),
    "qk_norm": bool(config.get("attn_l2_norm", True)),
    "shared_adaln": bool(config.get("shared_aln", False)),
    "norm_eps": float(config.get("norm_eps", 1e-6)),
  }


def read_scales(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
  """The sides of the grids of a config.json; default: those of 256 pixels. Raises UserError."""
  scales = config.get(name, list(VARConfig.scales))
  ok = isinstance(scales, list) and all(type(n) is int for n in scales)
  check(ok, name, scales, "must be a list of whole numbers")
  return tuple(scales)


def describe(cfg: VARConfig) -> dict[str, Any]:
  """The constructor's arguments."""
  return {
    "model_type": "var",
    "depth": cfg.layers,
    "embed_dim": cfg.width,
    "num_heads": cfg.heads,
    "mlp_ratio": cfg.mlp_width / cfg.width,
    "norm_eps": cfg.norm_eps,
    "shared_aln": cfg.shared_adaln,
    "attn_l2_norm": cfg.qk_norm,
    "patch_nums": list(cfg.scales),
    "num_classes": cfg.classes,
    "vocab_size": cfg.vocab,
    "Cvae": cfg.code_width,
  }


def tensors(cfg: VARConfig, config: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
  """Where every tensor stands; the files hold matrices as [out, in], and q, k, v one below the other by heads."""
  del config
  d, heads, h, f, first = cfg.width, cfg.heads, cfg.head_dim, cfg.mlp_width, cfg.scales[0] ** 2

  def modulation(param, n, layer=None):
    return {
      "1.weight": Tensor(f"{param}.weight", (n * d, d), (n, d, d), (2, 0, 1), layer),
      "1.bias": Tensor(f"{param}.bias", (n * d,), (n, d), layer=layer),
    }

  found = {
    "pos_start": Tensor("start", (1, first, d), (first, d)),
    "pos_1LC": Tensor("positions", (1, cfg.tokens, d), (cfg.tokens, d)),
    "word_embed.weight": Tensor("word", (d, cfg.code_width), axes=(1, 0)),
    "word_embed.bias": Tensor("word_bias", (d,)),
    "class_emb.weight": Tensor("classes", (cfg.classes + 1, d)),
    "lvl_embed.weight": Tensor("levels", (len(cfg.scales), d)),
  }
  if cfg.shared_adaln:
    found |= {f"shared_ada_lin.{name}": tensor for name, tensor in modulation("shared", 6).items()}
  for i in range(cfg.layers):
    attention, mlp = "blocks.attention", "blocks.mlp"
    layer = {
      "attn.q_bias": Tensor(f"{attention}.q_bias", (d,), (heads, h), layer=i),
      "attn.v_bias": Tensor(f"{attention}.v_bias", (d,), (heads, h), layer=i),
      "attn.mat_qkv.weight": Tensor(f"{attention}.qkv", (3 * d, d), (3, heads, h, d), (3, 1, 0, 2), i),
      "attn.proj.weight": Tensor(f"{attention}.out", (d, d), (d, heads, 1, h), (1, 2, 3, 0), i),
      "attn.proj.bias": Tensor(f"{attention}.out_bias", (d,), layer=i),
      "ffn.fc1.weight": Tensor(f"{mlp}.up", (f, d), axes=(1, 0), layer=i),
      "ffn.fc1.bias": Tensor(f"{mlp}.up_bias", (f,), layer=i),
      "ffn.fc2.weight": Tensor(f"{mlp}.down", (d, f), axes=(1, 0), layer=i),
      "ffn.fc2.bias": Tensor(f"{mlp}.down_bias", (d,), layer=i),
    }
    if cfg.qk_norm:
      layer["attn.scale_mul_1H11"] = Tensor(f"{attention}.scale", (1, heads, 1, 1), (heads,), layer=i)
    if cfg.shared_adaln:
      layer["ada_gss"] = Tensor("blocks.ada_offset", (1, 1, 6, d), (6, d), layer=i)
    else:
      layer |= {f"ada_lin.{name}": tensor for name, tensor in modulation("blocks.ada", 6, i).items()}
    found |= {f"blocks.{i}.{name}": tensor for name, tensor in layer.items()}
  found |= {f"head_nm.ada_lin.{name}": tensor for name, tensor in modulation("ada", 2).items()}
  found["head.weight"] = Tensor("head", (cfg.vocab, d), axes=(1, 0))
  found["head.bias"] = Tensor("head_bias", (cfg.vocab,))
  return found


def buffers(cfg: VARConfig) -> dict[str, np.ndarray]:
  """What released files carry beside the parameters: each token's scale, the mask, the bias that keys do not have."""
  levels = cfg.levels
  mask = np.where(levels[:, None] >= levels, 0, -np.inf).astype(np.float32)
  zeros = {f"blocks.{i}.attn.zero_k_bias": np.zeros(cfg.width, np.float32) for i in range(cfg.layers)}
  return {"lvl_1L": levels[None].astype(np.int64), "attn_bias_for_masking": mask[None, None], **zeros}


FAMILY = Family(
  name="var",
  reads=lambda config, keys: config.get("model_type") == "var" or {"pos_start", "lvl_embed.weight"} <= keys,
  settings=settings,
  tensors=tensors,
  make=VAR,
  writes=lambda model: isinstance(model, VAR),
  describe=describe,
  Config=VARConfig,
  infer=infer,
  images=True,
  buffers=buffers,
)
