"""Comparisons until a policy is good, and the share of runs that get there at all."""

import math

import numpy as np

from experiments.prefgames.reports.common import by_arm, legend_below, method, seeds, spread
from research import paths
from research import report as parts
from research.config import RunConfig


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Of the bandit a column a number of rare responses, against 1 / b; of the lock a column a b, against its bits."""
  arms, bs = by_arm(cfg), cfg.bandit.bs
  found = {
    (what, b): parts.final(parts.curves(workdir, f"runs/{what}@{b:g}"))
    for b in bs
    for what in ("succeeded", "comparisons")
  }
  arms = {arm: single for arm, single in arms.items() if arm in found["succeeded", bs[0]]}
  results, rows, points = {}, [], {}
  lock = cfg.bandit.kind == "lock"
  for arm, single in arms.items():
    bandit = single.bandit
    results[arm] = {"size": bandit.size, "budget": single.steps * bandit.updates}
    for what in ("succeeded", "comparisons"):
      results[arm][what] = {f"{b:g}": found[what, b][arm] for b in bs}
    cells = []
    for b in bs:
      share, taken = found["succeeded", b][arm], list(found["comparisons", b][arm].values())
      cells += [spread(share), _range(taken)]
      column, x = (b, bandit.size) if lock else (bandit.size, 1 / b)
      points.setdefault(column, {}).setdefault(arm.partition("-")[0], []).append((x, list(share.values()), taken))
    rows.append([method(arm), bandit.size, *cells])
  parts.write_results(workdir, {"arms": results, "runs": cfg.batch})

  fig, axes = parts.figure(len(points), 2)
  for column, (at, by_name) in zip(axes.T.reshape(len(points), 2), points.items(), strict=True):
    for i, (name, line) in enumerate(by_name.items()):
      line = sorted(line)
      xs = [x for x, *_ in line]
      for ax, k in zip(column, (1, 2), strict=True):
        middle = [np.median(point[k]) for point in line]  # of seeds; where most never succeed, no point
        middle = [v if math.isfinite(v) else math.nan for v in middle]
        ax.plot(xs, middle, label=method(name), **parts.style(i))
    column[0].set(title=f"b = {at:g}" if lock else f"{at} rare response{'s' * (at > 1)}", ylim=(-0.03, 1.03))
    column[1].axhline(cfg.steps * cfg.bandit.updates, color="grey", linewidth=0.8, linestyle="--")
    column[1].set(yscale="log", xlabel="bits of the lock" if lock else "1 / b", ylim=(0.8, None))
    column[1].set_xlim(column[0].get_xlim())
    for ax in column:
      ax.set_xticks(xs, [f"{x:.0f}" for x in xs])
  axes.reshape(2, -1)[0, 0].set_ylabel("share of runs that succeed")
  axes.reshape(2, -1)[1, 0].set_ylabel("comparisons, median run")
  legend_below(fig, column[0], 3)
  what = {"class": "exact argmin over a finite class", "softmax": "free softmax, gradient descent"}
  what["tokens"] = "free logits of every prefix, gradient descent"
  told = f"{what[cfg.bandit.policies]}; {cfg.batch} runs a seed, median of {seeds(cfg)}; dashed: the budget"
  fig.suptitle(told, fontsize=10)
  header = ["algorithm", "bits" if lock else "rare responses"]
  header += [f"b = {b:g}: {what}" for b in bs for what in ("share (± SD)", "median comparisons by seed")]
  parts.finish(workdir, fig, "steps.png", parts.table(header, rows))


def _range(taken: list[float]) -> str:
  return ", ".join(f"{v:g}" if math.isfinite(v) else "never" for v in taken)
