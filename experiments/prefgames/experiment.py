"""Learning from preferences that need not be transitive: exact games, and exploration where the reference is poor."""

import dataclasses
from typing import Literal

from experiments.prefgames import bandit, entanglement, online_offline, tables
from experiments.prefgames.bandit import BanditConfig
from experiments.prefgames.entanglement import PairConfig
from experiments.prefgames.online_offline import StringsConfig
from experiments.prefgames.tables import TableConfig
from research.config import RunConfig
from research.fit import Experiment

TASKS = {"table": tables.make, "bandit": bandit.make, "strings": online_offline.make, "pair": entanglement.make}


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
  experiment: str = "prefgames"
  task: Literal[*TASKS] = "table"
  report: Literal["gaps", "sweep", "contraction", "original", "optimisers", "steps", "goodhart", "entanglement"] = (
    "gaps"
  )
  batch: int = 32  # games, runs of a bandit, or worlds of strings
  length: int = 10  # responses of a game; the others have their own sizes
  log_every: int = 100
  x64: bool = True
  # each task's settings, under its name
  table: TableConfig = TableConfig()
  bandit: BanditConfig = BanditConfig()
  strings: StringsConfig = StringsConfig()
  pair: PairConfig = PairConfig()


def build(cfg: Config) -> Experiment:
  """One run: one method on many games. Call it under the run's mesh."""
  return TASKS[cfg.task](cfg, getattr(cfg, cfg.task))
