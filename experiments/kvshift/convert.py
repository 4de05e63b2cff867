"""Weights of KV-shifting models: Hugging Face's names for Llama, and two small arrays more in every layer.

The paper's listing (arXiv 2411.19574, appendix F) calls them K and V, [kv_heads, 2]
each, column 0 for the previous token: the layout of `KVShift`. No published
checkpoint's names are known, so config.json may give others, after `model.layers.{i}.`:

  "kv_shift_names": {"key": "self_attn.K", "value": "self_attn.V"}
"""

from collections.abc import Mapping, Set
import dataclasses
import functools
from typing import Any

from experiments.kvshift.attention import KVShift
from research.errors import check
from research.models.convert import llama
from research.models.convert.family import Tensor
from research.models.transformer import Transformer, TransformerConfig

NAMES = {"key": "self_attn.K", "value": "self_attn.V"}


def reads(config: Mapping[str, Any], keys: Set[str]) -> bool:
  """A Llama that says it shifts, or that holds the arrays and does not say."""
  if config.get("model_type") == "kvshift":
    return True
  held = any(f"model.layers.0.{name}" in keys for name in _names(config).values())
  return config.get("model_type") == "llama" and bool(config.get("kv_shift", held))


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
  """config.json -> fields of TransformerConfig."""
  flag = config.get("kv_shift", True)
  check(flag is True, "kv_shift", flag, "contradicts the model_type; must be true, or left out")
  return llama.settings(config)


def tensors(cfg: TransformerConfig, config: Mapping[str, Any]) -> dict[str, Tensor]:
  """Those of Llama and the coefficients of every layer."""
  return llama.tensors(cfg) | {
    f"model.layers.{i}.{name}": Tensor(f"blocks.attention.mix.{ours}", (cfg.kv_heads, 2), layer=i)
    for i in range(cfg.layers)
    for ours, name in _names(config).items()
  }


def describe(cfg: TransformerConfig) -> dict[str, Any]:
  """A model_type of its own: read as a plain Llama, the weights would give nonsense without a word."""
  return llama.describe(cfg) | {
    "model_type": "kvshift",
    "architectures": ["KVShiftForCausalLM"],
    "kv_shift": True,
  }


def _names(config: Mapping[str, Any]) -> dict[str, str]:
  names = config.get("kv_shift_names") or NAMES
  ok = isinstance(names, dict) and names.keys() == NAMES.keys() and all(isinstance(n, str) for n in names.values())
  check(ok and len(set(names.values())) == 2, "kv_shift_names", names, f"must be an object such as {NAMES}")
  return names


FAMILY = dataclasses.replace(
  llama.FAMILY,
  name="kvshift",
  reads=reads,
  settings=settings,
  tensors=tensors,
  make=functools.partial(Transformer, mix=KVShift),
  writes=lambda model: isinstance(model, Transformer) and isinstance(model.blocks.attention.mix, KVShift),
  describe=describe,
)
