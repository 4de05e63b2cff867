"""Learning from preferences that need not be transitive: exact games, and exploration where the reference is poor."""

import dataclasses
from typing import Literal

from experiments.prefgames import bandit, sequence, tables, text
from experiments.prefgames.bandit import BanditConfig
from experiments.prefgames.sequence import SequenceConfig
from experiments.prefgames.tables import TableConfig
from experiments.prefgames.text import TextTask
from research.config import RunConfig
from research.data.preferences import PreferenceConfig
from research.fit import Experiment
from research.models.transformer import TransformerConfig

TASKS = {"table": tables.make, "bandit": bandit.make, "sequence": sequence.make, "text": text.make}


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
  experiment: str = "prefgames"
  task: Literal[*TASKS] = "table"
  report: Literal["gaps", "sweep", "contraction", "original", "optimisers", "steps", "strings", "text"] = "gaps"
  batch: int = 32  # games, or runs of a bandit
  length: int = 10  # responses of a game; a bandit has its own size
  log_every: int = 100
  x64: bool = True
  # each task's settings, under its name
  table: TableConfig = TableConfig()
  bandit: BanditConfig = BanditConfig()
  sequence: SequenceConfig = SequenceConfig()
  text: TextTask = TextTask()
  # of the tasks that train language models
  model: TransformerConfig = TransformerConfig()
  data: PreferenceConfig = PreferenceConfig()


def build(cfg: Config) -> Experiment:
  """One run: one method on many games. Call it under the run's mesh."""
  return TASKS[cfg.task](cfg, getattr(cfg, cfg.task))
