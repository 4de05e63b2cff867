"""Where each method ends, against its step size."""

import numpy as np

from experiments.prefgames.reports.common import FLOOR, KINDS, by_arm, legend_below, method, scientific, spread
from research import paths
from research import report as parts
from research.config import RunConfig


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """A column a b; above the share of failed games, below the median gap, of the games that are not transitive."""
  kinds, rates = cfg.table.kinds, by_arm(cfg)
  found = {
    (kind, what, rate): parts.final(parts.curves(workdir, f"{kind}/{what}@{rate:g}"))
    for rate in next(iter(rates.values())).table.rates
    for kind in kinds
    for what in ("failed", "gap")
  }
  arms = {arm: single for arm, single in rates.items() if arm in next(iter(found.values()))}
  results, rows = {}, []
  for arm, single in arms.items():
    table = single.table
    of = lambda kind, what, arm=arm, table=table: {f"{r:g}": found[kind, what, r][arm] for r in table.rates}
    results[arm] = {"b": table.b, "updates": single.steps * table.updates}
    results[arm] |= {kind: {"failed": of(kind, "failed"), "median_gap": of(kind, "gap")} for kind in kinds}
    cells = []
    for kind in kinds:
      failed = {rate: np.mean(list(by_seed.values())) for rate, by_seed in of(kind, "failed").items()}
      gap = {rate: np.mean(list(by_seed.values())) for rate, by_seed in of(kind, "gap").items()}
      best = min(failed, key=lambda rate: (failed[rate], gap[rate]))
      results[arm][kind]["best_eta"] = best
      cells += [best, spread(of(kind, "failed")[best]), scientific(of(kind, "gap")[best])]
    rows.append([method(arm), f"{table.b:g}", *cells])
  parts.write_results(workdir, {"arms": results, "games": cfg.batch // len(kinds)})

  bs = sorted({single.table.b for single in arms.values()}, reverse=True)
  fig, axes = parts.figure(len(bs), 2)
  for column, b in zip(axes.T.reshape(len(bs), 2), bs, strict=True):
    mine = [(arm, single.table.rates) for arm, single in arms.items() if single.table.b == b]
    for i, (arm, rates) in enumerate(mine):
      for ax, what in zip(column, ("failed", "gap"), strict=True):
        values = np.array([list(found[kinds[0], what, rate][arm].values()) for rate in rates])
        values = np.where(np.isfinite(values), np.maximum(values, FLOOR if what == "gap" else 0), np.nan)
        ax.plot(rates, values.mean(1), label=method(arm), **parts.style(i))
        ax.fill_between(rates, values.min(1), values.max(1), color=parts.style(i)["color"], alpha=0.2, linewidth=0)
    updates = arms[mine[0][0]].table.updates * cfg.steps
    column[0].set(xscale="log", title=f"{KINDS[kinds[0]]}, b = {b:g}, {updates:,} updates", ylim=(-0.03, 1.03))
    column[1].set(xscale="log", yscale="log", xlabel="step size η")
  axes[0, 0].set_ylabel("share of games that failed")
  axes[1, 0].set_ylabel("duality gap, median over games")
  legend_below(fig, axes[0, 0])
  fig.suptitle(f"{cfg.batch // len(kinds)} games a seed, {parts.over_seeds(next(iter(found.values())))}")
  header = ["method", "b"]
  header += [f"{KINDS[kind]}: {what}" for kind in kinds for what in ("best η", "failed (± SD)", "median gap")]
  parts.finish(workdir, fig, "sweep.png", parts.table(header, rows))
