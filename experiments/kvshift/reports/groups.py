"""Accuracy at the end by the group of a row: for multi-hop, the number of hops."""

import re

import numpy as np

from experiments.kvshift.reports.common import label
from research import paths, writers
from research import report as parts
from research.config import RunConfig


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """One line an arm over accuracy_1, accuracy_2, ..."""
  seen = {name for r in writers.read(workdir / "metrics.jsonl") for name in r}
  groups = sorted(int(m[1]) for name in seen if (m := re.fullmatch(r"accuracy_(\d+)", name)))
  end = {g: parts.final(parts.curves(workdir, f"accuracy_{g}")) for g in groups}
  curves = parts.curves(workdir, "accuracy")
  arms = {arm: {f"accuracy_{g}": end[g][arm] for g in groups} for arm in curves}
  rows = [[label(arm), *(parts.spread(list(end[g][arm].values())) for g in groups)] for arm in curves]
  parts.write_results(workdir, {"arms": arms})

  fig, ax = parts.figure()
  for i, arm in enumerate(curves):
    values = np.array([list(end[g][arm].values()) for g in groups])
    mean = values.mean(1)
    ax.errorbar(
      groups, mean, yerr=[mean - values.min(1), values.max(1) - mean], capsize=3, label=label(arm), **parts.style(i)
    )
  ax.axhline(getattr(cfg, cfg.task).chance, color="grey", linestyle=":", label="guessing")
  ax.set(xlabel="hops", ylabel="accuracy, held-out rows", ylim=(-0.03, 1.03), xticks=groups)
  ax.set_title(
    f"{cfg.task}, {cfg.model.layers} layers of width {cfg.model.width}: {parts.over_seeds(curves)}", fontsize=10
  )
  ax.legend(frameon=False, fontsize=8)
  parts.finish(workdir, fig, "groups.png", parts.table(["accuracy (± SD) by hops", *map(str, groups)], rows))
