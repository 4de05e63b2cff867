"""Figures and tables of a finished workdir; `--config.report` names one."""

import functools

from experiments.transnormer.reports import ablations, generation, lengths, stability
from experiments.transnormer.reports.common import label
from research import comparison, paths
from research.config import RunConfig

REPORTS = {
  "loss": functools.partial(comparison.losses, base="transformer", label=label),
  "ablations": ablations.report,
  "lengths": lengths.report,
  "stability": stability.report,
  "generation": generation.report,
}


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Writes report/ of a finished workdir, and prints the table and where the figure is."""
  REPORTS[cfg.report](workdir, cfg)
