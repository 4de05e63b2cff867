"""Figures and tables of a finished workdir; `--config.report` names one."""

import pathlib

from experiments.kvshift.reports import accuracy, loss
from research.config import RunConfig

REPORTS = {"loss": loss.report, "accuracy": accuracy.report}


def report(workdir: pathlib.Path, cfg: RunConfig) -> None:
  """Writes report/ of a finished workdir, and prints the table and where the figure is."""
  REPORTS[cfg.report](workdir, cfg)
