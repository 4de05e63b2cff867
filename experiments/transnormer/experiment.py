"""TransNormerLLM against the transformer of the zoo, on text."""

import dataclasses
import functools
from typing import Literal

import jax

from experiments.transnormer import quadratic
from research.config import RunConfig
from research.data import TextConfig
from research.fit import Experiment
from research.language_modelling import language_modelling
from research.models import transformer, transnormer
from research.models.decoder import Decoder
from research.models.transformer import Transformer, TransformerConfig
from research.models.transnormer import TransNormer, TransNormerConfig

# quadratic: the same model with the attention it had before chunks, Lightning Attention-1
ARCHITECTURES = ("transnormer", "quadratic", "transformer")


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
  experiment: str = "transnormer"
  architecture: Literal[*ARCHITECTURES] = "transnormer"
  report: Literal["loss", "ablations", "lengths", "stability", "generation"] = "loss"
  model: TransNormerConfig = TransNormerConfig()  # architecture=transformer: the peer of these sizes
  data: TextConfig = TextConfig()


def build(cfg: Config) -> Experiment:
  """One run of one architecture with one seed. Call it under the run's mesh; it reads no data yet."""
  mesh = dict(jax.sharding.get_abstract_mesh().shape)
  if cfg.architecture == "transformer":
    peer(cfg.model).check_mesh(mesh, cfg.mesh.partition)
    flops = transformer.flops_per_token(peer(cfg.model), cfg.length)
  else:
    cfg.model.check_mesh(mesh, cfg.mesh.partition)
    flops = transnormer.flops_per_token(cfg.model)
  return language_modelling(cfg, functools.partial(make_model, cfg), flops)


def make_model(cfg: Config, key: jax.Array) -> Decoder:
  """The architecture that the config names."""
  if cfg.architecture == "transformer":
    return Transformer(key, peer(cfg.model), cfg.mesh.partition)
  attention = quadratic.attention if cfg.architecture == "quadratic" else None
  return TransNormer(key, cfg.model, cfg.mesh.partition, attention)


def peer(cfg: TransNormerConfig) -> TransformerConfig:
  """The transformer of the zoo with as many layers, heads and, to within 1 %, parameters.

  Its attention has no gate: what the gate's matrix takes goes to the feed-forward layer,
  three matrices of `mlp_width`, rounded to a multiple of 16 for meshes.
  """
  gate = cfg.heads * cfg.head_dim / 3 if cfg.gate else 0
  return TransformerConfig(
    vocab=cfg.vocab,
    width=cfg.width,
    layers=cfg.layers,
    heads=cfg.heads,
    kv_heads=cfg.heads,
    head_dim=cfg.head_dim,
    mlp_width=max(round((cfg.glu_width + gate) / 16), 1) * 16,
    tie_embeddings=cfg.tie_embeddings,
    precision=cfg.precision,
    remat=cfg.remat,
    layer_loop=cfg.layer_loop,
  )
