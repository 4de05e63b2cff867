"""Figures and tables of a finished workdir; `--config.report` names one."""

from experiments.prefgames.reports import (
  contraction,
  entanglement,
  gaps,
  goodhart,
  optimisers,
  original,
  steps,
  strings,
  sweep,
  text,
)
from research import paths
from research.config import RunConfig

REPORTS = {
  "gaps": gaps.report,
  "sweep": sweep.report,
  "contraction": contraction.report,
  "original": original.report,
  "optimisers": optimisers.report,
  "steps": steps.report,
  "strings": strings.report,
  "goodhart": goodhart.report,
  "entanglement": entanglement.report,
  "text": text.report,
}


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Writes report/ of a finished workdir, and prints the table and where the figure is."""
  REPORTS[cfg.report](workdir, cfg)
