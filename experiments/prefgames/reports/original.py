"""The game without KL terms: gap of the last policy and of the average one."""

import numpy as np

from experiments.prefgames.games import draw
from experiments.prefgames.reports.common import (
  KINDS,
  against,
  by_arm,
  label,
  legend_below,
  method,
  scientific,
  spread,
)
from research import paths
from research import report as parts
from research.config import RunConfig
from research.preference import games

WHICH = {"original": "last policy", "original_average": "average policy"}


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """A row a kind of games, a column for the last and one for the average policy; dotted: bounds on INPO's bias."""
  arms, kinds = by_arm(cfg), cfg.table.kinds
  curves = {(kind, which): parts.curves(workdir, f"{kind}/{which}") for kind in kinds for which in WHICH}
  arms = {arm: single for arm, single in arms.items() if arm in curves[kinds[0], "original"]}
  results, rows = {}, []
  for arm, single in arms.items():
    table = single.table
    ends = {kind: {w: parts.final(curves[kind, which])[arm] for which, w in WHICH.items()} for kind in kinds}
    results[arm] = {"eta": table.rates[0], "updates": single.steps * table.updates, "median_gap": ends}
    if table.method == "inpo":
      results[arm] |= {"tau": table.b, "bias_bound": {kind: bound(single, i) for i, kind in enumerate(kinds)}}
    cells = [spread(ends[kind][words]) for kind in kinds for words in WHICH.values()]
    low = [scientific(ends[kind]["last policy"]) for kind in kinds]
    rows.append([name(arm, single), *cells, *low])
  parts.write_results(workdir, {"arms": results, "games": cfg.batch // len(kinds)})

  fig, axes = parts.figure(2, len(kinds))
  axes = axes.reshape(len(kinds), 2)
  for i, (kind, line) in enumerate(zip(kinds, axes, strict=True)):
    for ax, (which, words) in zip(line, WHICH.items(), strict=True):
      drawn = against(curves[kind, which], arms)
      parts.draw(ax, drawn, lambda arm: name(arm, arms[arm]))
      ax.set(yscale="log", xlabel="updates", title=f"{KINDS[kind]}: {words}")
      if which == "original":
        for j, arm in enumerate(drawn):
          if arms[arm].table.method == "inpo":
            ax.axhline(bound(arms[arm], i), color=parts.style(j)["color"], linestyle=":", linewidth=1.2)
    line[0].set_ylabel("original game's gap, median")
  legend_below(fig, axes[0, 0], 3)
  fig.suptitle(
    f"{cfg.batch // len(kinds)} games of {cfg.length} responses a seed, "
    f"{parts.over_seeds(curves[kinds[0], 'original'])}; dotted: 2 τ max log 1/r, the bound on INPO's bias",
    fontsize=10,
  )
  header = ["method", *(f"{KINDS[kind]}: {words}, gap (± SD)" for kind in kinds for words in WHICH.values())]
  header += [f"{KINDS[kind]}: last, range over seeds" for kind in kinds]
  parts.finish(workdir, fig, "original.png", parts.table(header, rows))


def name(arm: str, single: RunConfig) -> str:
  """The method, with INPO's tau."""
  return f"{method(arm)}, τ = {single.table.b:g}" if single.table.method == "inpo" else label(arm)


def bound(single: RunConfig, kind: int) -> float:
  """The median over a kind's games of the bound on the original gap of the equilibrium at b = tau."""
  table = single.table
  rows = draw(table.kinds, single.seed, single.batch, single.length, table.b)
  size = single.batch // len(table.kinds)
  values = games.bias_bound(rows["log_reference"][kind * size : (kind + 1) * size], table.b)
  return float(np.median(np.asarray(values)))
