"""Figures and tables of a finished workdir; `--config.report` names one."""

from experiments.kvshift.reports import accuracy, gaps, groups, learned, loss, sweep, theory
from research import paths
from research.config import RunConfig

REPORTS = {
  "loss": loss.report,
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
