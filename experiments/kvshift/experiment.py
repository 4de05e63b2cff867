"""KV shifting attention against plain attention and its peers, on text and on synthetic tasks."""

import dataclasses
import functools
from typing import Literal

import jax

from experiments.kvshift.attention import KVShift
from experiments.kvshift.tasks import TASKS
from experiments.kvshift.tasks.hops import HopsConfig
from experiments.kvshift.tasks.induction import InductionConfig
from experiments.kvshift.tasks.math import MathConfig
from experiments.kvshift.tasks.ngram import NgramConfig
from experiments.kvshift.variants import VARIANTS
from research import data, optim
from research.config import RunConfig
from research.data import TextConfig
from research.errors import UserError, check
from research.fit import Experiment
from research.mesh import batch_shard
from research.models.decoder import next_token_loss
from research.models.transformer import Transformer, TransformerConfig, flops_per_token

ATTENTIONS = {"plain": None, "kvshift": KVShift, **VARIANTS}


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
  experiment: str = "kvshift"
  task: Literal["text", *TASKS] = "text"
  attention: Literal[*ATTENTIONS] = "kvshift"
  report: Literal["loss", "accuracy", "sweep", "groups", "gaps", "learned", "theory"] = "loss"
  sweep: str = ""  # report=sweep: the field on the x axis, e.g. model.width
  model: TransformerConfig = TransformerConfig()
  data: TextConfig = TextConfig()  # task=text
  # of the synthetic tasks, each under its name
  induction: InductionConfig = InductionConfig()
  ngram: NgramConfig = NgramConfig()
  hops: HopsConfig = HopsConfig()
  math: MathConfig = MathConfig()


def build(cfg: Config) -> Experiment:
  """One run of one attention with one seed. Call it under the run's mesh; it reads no data yet."""
  cfg.model.check_mesh(dict(jax.sharding.get_abstract_mesh().shape), cfg.mesh.partition)
  source, info, loss, batch = _text(cfg) if cfg.task == "text" else _synthetic(cfg)

  def rows(split):
    shard = batch_shard(jax.sharding.get_mesh())
    return data.batches(source(split), cfg.batch, seed=cfg.seed, shard=shard, train=split == "train")

  return Experiment(
    init=functools.partial(make_model, cfg),
    loss=loss,
    data=rows,
    batch=batch,
    tx=optim.make(cfg.tx, cfg.steps),
    flops_per_token=flops_per_token(cfg.model, cfg.length),
    info=info,
  )


def make_model(cfg: Config, key: jax.Array) -> Transformer:
  """The transformer of the zoo with one of the attentions; all shared weights start the same."""
  return Transformer(key, cfg.model, cfg.mesh.partition, ATTENTIONS[cfg.attention])


def _text(cfg: Config):
  @functools.cache
  def load():
    try:
      text = data.load(cfg.data, cfg.length, cfg.seed)
    except UserError as e:
      raise e.under("data") from None
    needed, name = text.tokenizer.vocab, text.tokenizer.name
    check(needed <= cfg.model.vocab, "model.vocab", cfg.model.vocab, f"tokenizer {name} needs at least {needed}")
    return text

  batch = functools.partial(data.abstract_rows, cfg.batch, cfg.length)
  return lambda split: load().split(split), lambda: load().info(), next_token_loss, batch


def _synthetic(cfg: Config):
  rows = functools.partial(TASKS[cfg.task], getattr(cfg, cfg.task), cfg.model.vocab, cfg.length, cfg.seed)

  def info():
    return {"source": cfg.task, "rows": {split: len(rows(split)) for split in ("train", "validation")}}

  def batch():
    row = rows("train")[0]
    return {name: jax.ShapeDtypeStruct((cfg.batch, *x.shape), x.dtype) for name, x in row.items()}

  return rows, info, getattr(cfg, cfg.task).loss, batch
