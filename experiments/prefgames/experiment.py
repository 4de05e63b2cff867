"""Learning from preferences that need not be transitive: exact games, and exploration where the reference is poor."""

import dataclasses
from typing import Literal

from experiments.prefgames import bandit, entanglement, online_offline, sequence, tables, text
from experiments.prefgames.bandit import BanditConfig
from experiments.prefgames.entanglement import PairConfig
from experiments.prefgames.online_offline import StringsConfig
from experiments.prefgames.sequence import SequenceConfig
from experiments.prefgames.tables import TableConfig
from experiments.prefgames.text import TextTask
from research.config import RunConfig
from research.data.preferences import PreferenceConfig
from research.fit import Experiment
from research.models.transformer import TransformerConfig

TASKS = {
  "table": tables.make,
  "bandit": bandit.make,
  "strings": online_offline.make,
  "pair": entanglement.make,
  "sequence": sequence.make,
  "text": text.make,
}
REPORTS = (
  *("gaps", "sweep", "contraction", "original", "optimisers", "steps"),
  *("goodhart", "entanglement", "strings", "text"),
)


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
  experiment: str = "prefgames"
  task: Literal[*TASKS] = "table"
  report: Literal[*REPORTS] = "gaps"
  batch: int = 32  # games, runs of a bandit, or worlds of strings
  length: int = 10  # responses of a game; the others have their own sizes
  log_every: int = 100
  x64: bool = True
  # each task's settings, under its name
  table: TableConfig = TableConfig()
  bandit: BanditConfig = BanditConfig()
  strings: StringsConfig = StringsConfig()
  pair: PairConfig = PairConfig()
  sequence: SequenceConfig = SequenceConfig()
  text: TextTask = TextTask()
  # of the tasks that train language models
  model: TransformerConfig = TransformerConfig()
  data: PreferenceConfig = PreferenceConfig()


def build(cfg: Config) -> Experiment:
  """One run: one method on many games. Call it under the run's mesh."""
  return TASKS[cfg.task](cfg, getattr(cfg, cfg.task))
