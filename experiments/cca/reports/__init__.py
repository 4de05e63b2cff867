"""Figures and tables of a finished workdir; `--config.report` names one."""

from experiments.cca.reports import digits, rewards, toy
from research import paths
from research.config import RunConfig

REPORTS = {"toy": toy.report, "digits": digits.report, "rewards": rewards.report}


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Writes report/ of a finished workdir, and prints the table and where the figure is."""
  REPORTS[cfg.report](workdir, cfg)
