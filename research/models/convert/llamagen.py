"""LlamaGen's class-conditional models as their authors released them: a file of PyTorch's without a config.json.

A config.json may stand beside it, with the arguments of the released code's constructor. It must say what
the tensors do not: block_size, the tokens of an image, and n_head for sizes that were never released.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from research.errors import check
from research.models.convert.family import Family, Tensor, count
from research.models.convert.files import Stored
from research.models.llamagen import SIZES, LlamaGen, LlamaGenConfig

_CLASSES = "cls_embedding.embedding_table.weight"


def infer(stored: Mapping[str, Stored]) -> dict[str, Any]:
  """What the tensors' shapes say of the constructor's arguments."""
  shape = {key: x.shape for key, x in stored.items()}
  if len(shape.get("tok_embeddings.weight", ())) != 2:
    return {}
  vocab, width = shape["tok_embeddings.weight"]
  layers = len({key.split(".")[1] for key in shape if key.startswith("layers.")})
  heads = {(n, d): h for n, h, d in SIZES.values()}.get((layers, width))
  said = {"dim": width, "n_layer": layers, "n_head": heads, "vocab_size": vocab}
  if "freqs_cis" in shape:  # a table [1 + tokens, head_dim / 2, 2] that some files carry
    said |= {"block_size": shape["freqs_cis"][0] - 1, "n_head": width // (2 * shape["freqs_cis"][1])}
  if _CLASSES in shape:
    said["num_classes"] = shape[_CLASSES][0] - 1
  if "layers.0.feed_forward.w1.weight" in shape:
    said["ffn_hidden_dim"] = shape["layers.0.feed_forward.w1.weight"][0]
  qkv, heads = shape.get("layers.0.attention.wqkv.weight"), said["n_head"]
  if qkv and heads and width % heads == 0:
    said["n_kv_head"] = (qkv[0] * heads // width - heads) // 2
  return said


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
  """The constructor's arguments -> fields of LlamaGenConfig. Raises UserError for what this importer does not know."""
  kind = config.get("model_type", "c2i")  # the constructor's, or ours
  check(kind in ("c2i", "llamagen"), "model_type", kind, "only class-conditional models (c2i) can be read")
  width, heads = count(config, "dim"), count(config, "n_head")
  check(width % heads == 0, "dim", width, f"must be a multiple of n_head={heads}")
  return {
    "vocab": count(config, "vocab_size", 16384),
    "width": width,
    "layers": count(config, "n_layer"),
    "heads": heads,
    "kv_heads": count(config, "n_kv_head", heads),
    "head_dim": width // heads,
    "mlp_width": count(config, "ffn_hidden_dim"),
    "rope_base": float(config.get("rope_base", 10000)),
    "norm_eps": float(config.get("norm_eps", 1e-5)),
    "qk_norm": False,
    "tie_embeddings": False,
    "classes": count(config, "num_classes", 1000),
    "tokens": count(config, "block_size"),
  }


def describe(cfg: LlamaGenConfig) -> dict[str, Any]:
  """The constructor's arguments. Raises UserError for what released files have no place for."""
  for name, value in {"qk_norm": False, "tie_embeddings": False}.items():
    check(getattr(cfg, name) == value, f"model.{name}", getattr(cfg, name), "released files have no place for it")
  kind = cfg.rope_scaling.kind
  check(kind == "default", "model.rope_scaling", kind, "released files have no place for it")
  return {
    "model_type": "llamagen",
    "dim": cfg.width,
    "n_layer": cfg.layers,
    "n_head": cfg.heads,
    "n_kv_head": cfg.kv_heads,
    "vocab_size": cfg.vocab,
    "num_classes": cfg.classes,
    "block_size": cfg.tokens,
    "ffn_hidden_dim": cfg.mlp_width,
    "rope_base": cfg.rope_base,
    "norm_eps": cfg.norm_eps,
  }


def tensors(cfg: LlamaGenConfig, config: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
  """Where every tensor stands; the files hold matrices as [out, in], and rotate neighbours instead of halves."""
  del config
  d, kv, group, h, f = cfg.width, cfg.kv_heads, cfg.heads // cfg.kv_heads, cfg.head_dim, cfg.mlp_width
  rows = _qkv_rows(kv, group, h)
  found = {
    _CLASSES: Tensor("classes", (cfg.classes + 1, d)),
    "tok_embeddings.weight": Tensor("decoder.embed", (cfg.vocab, d)),
  }
  for i in range(cfg.layers):

    def half(start):  # gate, then up: [f, d] -> [d, 1, f]
      return Tensor("decoder.blocks.mlp.up", (f, d), (1, f, d), (2, 0, 1), i, (1, start, start + 1))

    split = (kv, group + 2, h, d)
    qkv = Tensor("decoder.blocks.attention.qkv", (len(rows), d), split, (3, 0, 1, 2), i, rows=rows)
    out = Tensor("decoder.blocks.attention.out", (d, kv * group * h), (d, kv, group, h), (1, 2, 3, 0), i)
    layer = {
      "attention.wqkv.weight": qkv,
      "attention.wo.weight": out,
      "feed_forward.w1.weight": half(0),
      "feed_forward.w3.weight": half(1),
      "feed_forward.w2.weight": Tensor("decoder.blocks.mlp.down", (d, f), axes=(1, 0), layer=i),
      "attention_norm.weight": Tensor("decoder.blocks.attention_norm.scale", (d,), layer=i),
      "ffn_norm.weight": Tensor("decoder.blocks.mlp_norm.scale", (d,), layer=i),
    }
    found |= {f"layers.{i}.{name}": tensor for name, tensor in layer.items()}
  found["norm.weight"] = Tensor("decoder.norm.scale", (d,))
  found["output.weight"] = Tensor("decoder.head", (cfg.vocab, d), axes=(1, 0))
  return found


def _qkv_rows(kv: int, group: int, h: int) -> tuple[int, ...]:
  """The rows of wqkv (all queries, all keys, all values) by key-value head, the halves of a rotated head apart."""
  q, k, v = np.split(np.arange((group + 2) * kv * h), [kv * group * h, kv * (group + 1) * h])
  # pair i of a head is its elements 2i, 2i + 1 in the file, and i, i + h/2 here; values are not rotated
  apart = lambda x, n: x.reshape(kv, n, h // 2, 2).swapaxes(2, 3).reshape(kv, n, h)
  return tuple(np.concatenate([apart(q, group), apart(k, 1), v.reshape(kv, 1, h)], axis=1).ravel().tolist())


FAMILY = Family(
  name="llamagen",
  reads=lambda config, keys: config.get("model_type") == "llamagen" or _CLASSES in keys,
  settings=settings,
  tensors=tensors,
  make=LlamaGen,
  writes=lambda model: isinstance(model, LlamaGen),
  describe=describe,
  Config=LlamaGenConfig,
  infer=infer,
  images=True,
  ignores=("freqs_cis", ".kv_cache.k_cache", ".kv_cache.v_cache"),
)
