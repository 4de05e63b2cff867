"""Accuracy on held-out rows of a synthetic task, against steps."""

from experiments.kvshift.reports.common import MEASURES, label, measured
from research import paths
from research import report as parts
from research.config import RunConfig


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Accuracy (of whole solutions, where the task has them) against steps, and when 99 % is first reached."""
  metric, accuracy = measured(workdir)
  arms, rows = {}, []
  for arm, seeds in accuracy.items():
    last = [points[-1][1] for points in seeds.values()]
    reached = [next((step for step, a in points if a >= 0.99), None) for points in seeds.values()]
    arms[arm] = {metric: dict(zip(seeds, last, strict=True)), "steps_to_99": dict(zip(seeds, reached, strict=True))}
    steps = ", ".join("never" if r is None else str(r) for r in reached)
    rows.append([label(arm), len(last), parts.spread(last), steps])
    if metric == "rows_right":
      of_tokens = parts.final(parts.curves(workdir, "accuracy"))[arm]
      arms[arm]["accuracy"] = of_tokens
      rows[-1].append(parts.spread(list(of_tokens.values())))
  parts.write_results(workdir, {"arms": arms})

  depths = " by layers" if all("-" in arm for arm in accuracy) else ""
  fig, ax = parts.figure()
  parts.draw(ax, accuracy, label)
  chance = getattr(cfg, cfg.task).chance
  if chance:
    ax.axhline(chance, color="grey", linestyle=":", label="guessing")
  ax.set(xlabel="training step", ylabel=f"{MEASURES[metric]}, held-out rows", ylim=(-0.03, 1.03))
  ax.set_title(f"{cfg.task}{depths}, width {cfg.model.width}: {parts.over_seeds(accuracy)}", fontsize=10)
  ax.legend(frameon=False, fontsize=8)
  header = ["attention", "seeds", f"{MEASURES[metric]} at the end (± SD)", "steps to 99 %, by seed"]
  header += ["tokens right (± SD)"] if metric == "rows_right" else []
  parts.finish(workdir, fig, "accuracy.png", parts.table(header, rows))
