"""Condition contrastive alignment: guidance without its cost, for models that write images token by token."""

import dataclasses
from typing import Literal

from experiments.cca import toy
from experiments.cca.toy import ToyConfig
from research.config import RunConfig
from research.fit import Experiment

TASKS = {"toy": toy.make}


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
  experiment: str = "cca"
  task: Literal[*TASKS] = "toy"
  report: Literal["toy"] = "toy"
  # each task's settings, under its name
  toy: ToyConfig = ToyConfig()


def build(cfg: Config) -> Experiment:
  """One run of one task with one seed. Call it under the run's mesh."""
  return TASKS[cfg.task](cfg, getattr(cfg, cfg.task))
