"""KV shifting attention against plain attention, on text and on induction."""

import dataclasses
import functools
from typing import Literal

import jax

from experiments.kvshift.attention import KVShift
from experiments.kvshift.induction import InductionConfig, InductionRows, induction_loss
from research import data, optim
from research.config import RunConfig
from research.data import TextConfig
from research.errors import check
from research.fit import Experiment
from research.mesh import batch_shard
from research.models.transformer import Transformer, TransformerConfig, flops_per_token, next_token_loss


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
  experiment: str = "kvshift"
  task: Literal["text", "induction"] = "text"
  attention: Literal["plain", "kvshift"] = "kvshift"
  model: TransformerConfig = TransformerConfig()
  data: TextConfig = TextConfig()  # task=text
  induction: InductionConfig = InductionConfig()  # task=induction


def build(cfg: Config) -> Experiment:
  """One run of one attention with one seed. Call it under the run's mesh."""
  mesh = jax.sharding.get_mesh()
  cfg.model.check_mesh(dict(mesh.shape), cfg.mesh.partition)
  source, info = {"text": _text, "induction": _induction}[cfg.task](cfg)
  shard = batch_shard(mesh)

  def rows(split):
    return data.batches(source(split), cfg.batch, seed=cfg.seed, shard=shard, train=split == "train")

  return Experiment(
    init=functools.partial(make_model, cfg),
    loss={"text": next_token_loss, "induction": induction_loss}[cfg.task],
    data=rows,
    tx=optim.make(cfg.tx, cfg.steps),
    flops_per_step=sum(flops_per_token(cfg.model, cfg.length).values()) * cfg.batch * cfg.length,
    info=info,
  )


def make_model(cfg: Config, key: jax.Array) -> Transformer:
  """The transformer of the zoo, with or without the shift; all shared weights start the same."""
  return Transformer(key, cfg.model, cfg.mesh.partition, KVShift if cfg.attention == "kvshift" else None)


def _text(cfg: Config):
  text = data.load(cfg.data, cfg.length, cfg.seed)
  check(
    text.tokenizer.vocab <= cfg.model.vocab,
    "model.vocab",
    cfg.model.vocab,
    f"the tokenizer {text.tokenizer.name} has {text.tokenizer.vocab} tokens; set model.vocab to at least that",
  )
  return text.split, text.info()


def _induction(cfg: Config):
  rows = functools.partial(InductionRows, cfg.induction, cfg.model.vocab, cfg.length, cfg.seed)
  rows("train")  # tells what does not fit now rather than at the first batch
  return rows, {"source": "induction", **dataclasses.asdict(cfg.induction)}
