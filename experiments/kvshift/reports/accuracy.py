"""Accuracy on held-out rows of a synthetic task, against steps."""

import pathlib

from experiments.kvshift.reports.common import finish, label
from research import report as parts
from research.config import RunConfig


def report(workdir: pathlib.Path, cfg: RunConfig) -> None:
  """Accuracy on held-out rows against steps, and when 99 % is first reached."""
  accuracy = parts.curves(workdir, "accuracy")
  arms, rows = {}, []
  for arm, seeds in accuracy.items():
    last = [points[-1][1] for points in seeds.values()]
    reached = [next((step for step, a in points if a >= 0.99), None) for points in seeds.values()]
    arms[arm] = {"accuracy": dict(zip(seeds, last, strict=True)), "steps_to_99": dict(zip(seeds, reached, strict=True))}
    steps = ", ".join("never" if r is None else str(r) for r in reached)
    rows.append([label(arm), len(last), parts.spread(last), steps])
  parts.write_results(workdir, {"arms": arms})

  fig, ax = parts.figure()
  parts.draw(ax, accuracy, label)
  ax.axhline(1 / cfg.induction.keys, color="grey", linestyle=":", label="guessing")
  ax.set(xlabel="training step", ylabel="accuracy on held-out rows", ylim=(0, 1.03))
  ax.set_title(f"Induction, width {cfg.model.width}: {parts.over_seeds(accuracy)}", fontsize=10)
  ax.legend(frameon=False, loc="center right")
  header = ["attention", "seeds", "accuracy at the end (± SD)", "steps to 99 %, by seed"]
  finish(workdir, fig, "accuracy.png", parts.table(header, rows))
