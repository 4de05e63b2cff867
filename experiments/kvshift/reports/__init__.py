"""Figures and tables of a finished workdir; `--config.report` names one."""

import functools

from experiments.kvshift.reports import accuracy, gaps, groups, learned, sweep, theory
from experiments.kvshift.reports.common import label
from research import comparison, paths
from research.config import RunConfig

REPORTS = {
  "loss": functools.partial(comparison.losses, base="plain", label=label),
  "accuracy": accuracy.report,
  "sweep": sweep.report,
  "groups": groups.report,
  "gaps": gaps.report,
  "learned": learned.report,
  "theory": theory.report,
}


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Writes report/ of a finished workdir, and prints the table and where the figure is."""
  REPORTS[cfg.report](workdir, cfg)
