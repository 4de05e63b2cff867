"""KV shifting attention against plain attention and its peers, on text and on synthetic tasks."""

from collections.abc import Callable
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
from research import optim
from research.config import RunConfig
from research.data import TextConfig
from research.fit import Experiment
from research.language_modelling import language_modelling, rows
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
  kind = language_modelling if cfg.task == "text" else _synthetic
  return kind(cfg, functools.partial(make_model, cfg), flops_per_token(cfg.model, cfg.length))


def make_model(cfg: Config, key: jax.Array) -> Transformer:
  """The transformer of the zoo with one of the attentions; all shared weights start the same."""
  return Transformer(key, cfg.model, cfg.mesh.partition, ATTENTIONS[cfg.attention])


def _synthetic(cfg: Config, init: Callable, flops_per_token: dict[str, float]) -> Experiment:
  task = getattr(cfg, cfg.task)
  source = functools.partial(TASKS[cfg.task], task, cfg.model.vocab, cfg.length, cfg.seed)

  def info():
    return {"source": cfg.task, "rows": {split: len(source(split)) for split in ("train", "validation")}}

  def batch():
    row = source("train")[0]
    return {name: jax.ShapeDtypeStruct((cfg.batch, *x.shape), x.dtype) for name, x in row.items()}

  return Experiment(
    init=init,
    loss=task.loss,
    data=lambda split: rows(cfg, source(split), split),
    batch=batch,
    tx=optim.make(cfg.tx, cfg.steps),
    flops_per_token=flops_per_token,
    info=info,
  )
