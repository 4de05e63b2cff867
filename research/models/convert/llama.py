"""Llama as Hugging Face's transformers stores it (versions 4 and 5 of its config.json)."""

from collections.abc import Mapping
import math
from typing import Any

from research.errors import UserError, check
from research.models.convert.family import Family, Tensor, count
from research.models.transformer import Transformer, TransformerConfig
from research.nn.rope import RopeScaling

# our name of each number of a scaled rotary embedding: theirs
_ROPE = {
  "default": {},
  "linear": {"factor": "factor"},
  "llama3": {
    "factor": "factor",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
  },
}


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
  """config.json -> fields of TransformerConfig. Raises UserError for a Llama that the transformer of the zoo is not."""
  for name in ("attention_bias", "mlp_bias"):
    check(not config.get(name), name, config.get(name), "projections have no bias here; only false can be read")
  act = config.get("hidden_act", "silu")
  check(act in ("silu", "swish"), "hidden_act", act, "only silu can be read")
  width, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
  if config.get("head_dim") is None:
    fix = f"must be a multiple of num_attention_heads={heads} where head_dim is not given"
    check(width % heads == 0, "hidden_size", width, fix)
  base, scaling = _rope(config)
  return {
    "vocab": count(config, "vocab_size"),
    "width": width,
    "layers": count(config, "num_hidden_layers"),
    "heads": heads,
    "kv_heads": count(config, "num_key_value_heads", heads),
    "head_dim": count(config, "head_dim", width // heads),
    "mlp_width": count(config, "intermediate_size"),
    "rope_base": base,
    "rope_scaling": scaling,
    "norm_eps": _number(config, "rms_norm_eps", 1e-6),
    "qk_norm": False,
    "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
  }


def describe(cfg: TransformerConfig) -> dict[str, Any]:
  """config.json of the model, for transformers 5 (rope_parameters) and 4 (rope_theta, rope_scaling)."""
  check(not cfg.qk_norm, "model.qk_norm", cfg.qk_norm, "Llama files have no place for the norms of queries and keys")
  scaling = {"rope_type": cfg.rope_scaling.kind}
  scaling |= {theirs: getattr(cfg.rope_scaling, ours) for ours, theirs in _ROPE[cfg.rope_scaling.kind].items()}
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": cfg.vocab,
    "hidden_size": cfg.width,
    "num_hidden_layers": cfg.layers,
    "num_attention_heads": cfg.heads,
    "num_key_value_heads": cfg.kv_heads,
    "head_dim": cfg.head_dim,
    "intermediate_size": cfg.mlp_width,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": cfg.norm_eps,
    "rope_parameters": {"rope_theta": cfg.rope_base, **scaling},
    "rope_theta": cfg.rope_base,
    "rope_scaling": None if cfg.rope_scaling.kind == "default" else scaling,
    "tie_word_embeddings": cfg.tie_embeddings,
  }


def tensors(cfg: TransformerConfig, config: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
  """Where every tensor stands; the files hold matrices as [out, in], heads in order, queries by key-value head."""
  del config
  d, kv, group, h, f = cfg.width, cfg.kv_heads, cfg.heads // cfg.kv_heads, cfg.head_dim, cfg.mlp_width
  found = {"model.embed_tokens.weight": Tensor("embed", (cfg.vocab, d))}
  for i in range(cfg.layers):

    def projection(n, start):  # n heads of every group: [kv n h, d] -> [d, kv, n, h]
      at = (2, start, start + n)
      return Tensor("blocks.attention.qkv", (kv * n * h, d), (kv, n, h, d), (3, 0, 1, 2), i, at)

    def half(start):  # gate, then up: [f, d] -> [d, 1, f]
      return Tensor("blocks.mlp.up", (f, d), (1, f, d), (2, 0, 1), i, (1, start, start + 1))

    out = Tensor("blocks.attention.out", (d, kv * group * h), (d, kv, group, h), (1, 2, 3, 0), i)
    layer = {
      "self_attn.q_proj.weight": projection(group, 0),
      "self_attn.k_proj.weight": projection(1, group),
      "self_attn.v_proj.weight": projection(1, group + 1),
      "self_attn.o_proj.weight": out,
      "mlp.gate_proj.weight": half(0),
      "mlp.up_proj.weight": half(1),
      "mlp.down_proj.weight": Tensor("blocks.mlp.down", (d, f), axes=(1, 0), layer=i),
      "input_layernorm.weight": Tensor("blocks.attention_norm.scale", (d,), layer=i),
      "post_attention_layernorm.weight": Tensor("blocks.mlp_norm.scale", (d,), layer=i),
    }
    found |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
  found["model.norm.weight"] = Tensor("norm.scale", (d,))
  if cfg.tie_embeddings:
    found["lm_head.weight"] = Tensor("embed", (cfg.vocab, d), copy=True)
  else:
    found["lm_head.weight"] = Tensor("head", (cfg.vocab, d), axes=(1, 0))
  return found


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling]:
  # version 5 has all in rope_parameters; version 4 rope_theta beside rope_scaling, whose kind is `type` in older files
  groups = [config.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
  check(all(isinstance(g, dict) for g in groups), "rope_scaling", groups[1], "must be an object or null")
  kinds = [g.get("rope_type", g.get("type", "default")) for g in groups if g] or ["default"]
  partial = [g["partial_rotary_factor"] for g in (*groups, config) if g.get("partial_rotary_factor") is not None]
  check(all(x == 1 for x in partial), "partial_rotary_factor", partial, "must be 1: all of a head is rotated here")
  check(len(set(map(str, kinds))) == 1, "rope_type", kinds, "rope_parameters and rope_scaling must agree")
  kind = kinds[0]
  check(kind in list(_ROPE), "rope_type", kind, f"no such scaling here; choose from {', '.join(_ROPE)}")
  bases = {_number(g, "rope_theta") for g in (*groups, config) if g.get("rope_theta") is not None} or {10000.0}
  check(len(bases) == 1, "rope_theta", sorted(bases), "rope_parameters and rope_theta must agree")
  scaling = groups[0] or groups[1]
  whole = ("original_length",)
  values = {ours: (count if ours in whole else _number)(scaling, theirs) for ours, theirs in _ROPE[kind].items()}
  return bases.pop(), RopeScaling(kind, **values)


def _number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
  value = config.get(name)
  value = default if value is None else value
  ok = type(value) in (int, float) and math.isfinite(value)
  if not ok:
    raise UserError(name, value, "must be a number")
  return float(value)


FAMILY = Family(
  name="llama",
  reads=lambda config, keys: config.get("model_type") == "llama",
  settings=settings,
  tensors=tensors,
  make=Transformer,
  writes=lambda model: isinstance(model, Transformer) and model.blocks.attention.mix is None,
  describe=describe,
  ignores=(".rotary_emb.inv_freq",),  # tables that very old files carry; what they hold follows from the config
)
