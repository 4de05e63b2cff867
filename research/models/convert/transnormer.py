"""TransNormerLLM as its authors released it.

Of what the model can be, the format says the sizes, which layers have phases, the activation, the
scale of the embeddings and the tied head; the rest is fixed: the released code's decays, the gate,
the norm without parameters. A head that config.json does not mention is tied.
"""

from collections.abc import Mapping
from typing import Any

from research.errors import check
from research.models.convert.family import Family, Tensor, count
from research.models.transnormer import TransNormer, TransNormerConfig

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "1+elu": "1+elu", "none": "none", "identity": "none"}
# what the released code does and its files cannot say otherwise
_FIXED = {"decay": "released", "temperature": True, "gate": True, "glu_activation": "none"}
_FIXED |= {"norm": "srms", "norm_eps": 1e-6}


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
  """config.json -> fields of TransNormerConfig. Raises UserError for what this importer does not know."""
  norm, act = config.get("norm_type", "simplermsnorm"), config.get("linear_act_fun", "silu")
  check(not config.get("bias"), "bias", config.get("bias"), "projections have no bias here; only false can be read")
  check(norm == "simplermsnorm", "norm_type", norm, "only simplermsnorm can be read")
  check(act in list(_ACTIVATIONS), "linear_act_fun", act, f"no such activation here; use {', '.join(_ACTIVATIONS)}")
  width, heads = count(config, "decoder_embed_dim"), count(config, "decoder_attention_heads")
  inner, layers = count(config, "hidden_dim", width), count(config, "decoder_layers")
  check(inner % heads == 0, "hidden_dim", inner, f"must be a multiple of decoder_attention_heads={heads}")
  return {
    "vocab": count(config, "vocab_size"),
    "width": width,
    "layers": layers,
    "heads": heads,
    "head_dim": inner // heads,
    "glu_width": count(config, "glu_dim"),
    "position": _position(config.get("linear_use_lrpe_list"), layers),
    "activation": _ACTIVATIONS[act],
    "scale_embedding": not config.get("no_scale_embedding", False),
    "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
    **_FIXED,
  }


def _position(flags: Any, layers: int) -> str:
  name = "linear_use_lrpe_list"
  ok = isinstance(flags, list) and len(flags) == layers and all(flag in (0, 1) for flag in flags)
  check(ok, name, flags, f"must have a 0 or 1 for each of decoder_layers={layers}")
  kinds = {layers: "lrpe_all", 0: "none"} | ({1: "lrpe_first"} if flags[0] else {})
  check(sum(flags) in kinds, name, flags, "only the first layer, all or none can have phases here")
  return kinds[sum(flags)]


def describe(cfg: TransNormerConfig) -> dict[str, Any]:
  """config.json. Raises UserError for what released files have no place for."""
  for name, value in _FIXED.items():
    fix = f"released files have no place for it; only {value} can be exported"
    check(getattr(cfg, name) == value, f"model.{name}", getattr(cfg, name), fix)
  check(cfg.position != "ape", "model.position", cfg.position, "released files have no place for it")
  return {
    "architectures": ["TransnormerForCausalLM"],
    "model_type": "transnormer",
    "vocab_size": cfg.vocab,
    "decoder_embed_dim": cfg.width,
    "hidden_dim": cfg.heads * cfg.head_dim,
    "decoder_layers": cfg.layers,
    "decoder_attention_heads": cfg.heads,
    "glu_dim": cfg.glu_width,
    "linear_act_fun": cfg.activation,
    "norm_type": "simplermsnorm",
    "linear_use_lrpe_list": [int(i < cfg.lrpe_layers) for i in range(cfg.layers)],
    "no_scale_embedding": not cfg.scale_embedding,
    "bias": False,
    "tie_word_embeddings": cfg.tie_embeddings,
  }


def tensors(cfg: TransNormerConfig, config: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
  """Where every tensor stands; the files hold matrices as [out, in], and q, k, v, u one below the other by heads."""
  del config
  d, heads, h, f = cfg.width, cfg.heads, cfg.head_dim, cfg.glu_width
  found = {"model.embed_tokens.weight": Tensor("embed", (cfg.vocab, d))}
  for i in range(cfg.layers):
    lrpe = i < cfg.lrpe_layers
    stack, at = ("lrpe_blocks", i) if lrpe else ("blocks", i - cfg.lrpe_layers)

    def half(start):  # [f, d] -> [d, 1, f]
      return Tensor(f"{stack}.mlp.up", (f, d), (1, f, d), (2, 0, 1), at, (1, start, start + 1))

    qkvu = Tensor(f"{stack}.attention.qkvu", (4 * heads * h, d), (4, heads, h, d), (3, 1, 0, 2), at)
    theta = Tensor(f"{stack}.attention.theta", (heads, 1, h), (heads, h), layer=at)
    layer = {
      "token_mixer.out_proj.weight": Tensor(f"{stack}.attention.out", (d, heads * h), axes=(1, 0), layer=at),
      **({"token_mixer.lrpe.theta": theta} if lrpe else {}),
      "token_mixer.qkvu_proj.weight": qkvu,
      "channel_mixer.l1.weight": half(0),
      "channel_mixer.l2.weight": half(1),
      "channel_mixer.l3.weight": Tensor(f"{stack}.mlp.down", (d, f), axes=(1, 0), layer=at),
    }
    found |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
  if cfg.tie_embeddings:
    found["lm_head.weight"] = Tensor("embed", (cfg.vocab, d), copy=True)
  else:
    found["lm_head.weight"] = Tensor("head", (cfg.vocab, d), axes=(1, 0))
  return found


FAMILY = Family(
  name="transnormer",
  reads=lambda config, keys: config.get("model_type") == "transnormer",
  settings=settings,
  tensors=tensors,
  make=TransNormer,
  writes=lambda model: isinstance(model, TransNormer),
  describe=describe,
  Config=TransNormerConfig,
)
