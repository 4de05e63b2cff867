"""The duality gap of every method, against updates and against preference queries, and how many games fail."""

from experiments.prefgames.reports.common import (
  KINDS,
  against,
  by_arm,
  legend_below,
  method,
  scientific,
  spread,
)
from experiments.prefgames.tables import FAILED
from research import paths
from research import report as parts
from research.config import RunConfig


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """A column a b; a row a kind of games, and for the first kind one more against queries."""
  arms = by_arm(cfg)
  kinds = cfg.table.kinds
  gaps = {kind: parts.curves(workdir, f"{kind}/gap") for kind in kinds}
  failed = {kind: parts.final(parts.curves(workdir, f"{kind}/failed")) for kind in kinds}
  arms = {arm: single for arm, single in arms.items() if arm in gaps[kinds[0]]}
  results, rows = {}, []
  for arm, single in arms.items():
    ends = {kind: parts.final(gaps[kind])[arm] for kind in kinds}
    results[arm] = {"updates": single.steps * single.table.updates, "eta": single.table.rates[0]}
    results[arm] |= {"median_gap": ends, "failed": {kind: failed[kind][arm] for kind in kinds}}
    cells = [cell for kind in kinds for cell in (scientific(ends[kind]), spread(failed[kind][arm]))]
    rows.append([method(arm), f"{single.table.b:g}", f"{results[arm]['updates']:,}", *cells])
  parts.write_results(workdir, {"arms": results, "games": cfg.batch // len(kinds)})

  bs = sorted({single.table.b for single in arms.values()}, reverse=True)
  panels = [(kinds[0], "updates"), (kinds[0], "queries"), *((kind, "updates") for kind in kinds[1:])]
  fig, axes = parts.figure(len(bs), len(panels))
  axes = axes.reshape(len(panels), len(bs))
  for line, (kind, x) in zip(axes, panels, strict=True):
    for ax, b in zip(line, bs, strict=True):
      mine = {arm: seeds for arm, seeds in gaps[kind].items() if arm in arms and arms[arm].table.b == b}
      parts.draw(ax, against(mine, arms, x), method)
      ax.axhline(FAILED, color="grey", linewidth=0.8, linestyle="--")
      ax.locator_params(axis="x", nbins=5)
      ax.set(yscale="log", title=f"{KINDS[kind]}, b = {b:g}", xlabel=_axis(x, cfg))
    line[0].set_ylabel("duality gap, median over games")
  legend_below(fig, axes[0, 0])
  told = f"{cfg.batch // len(kinds)} games a seed, {parts.over_seeds(gaps[kinds[0]])};"
  fig.suptitle(told + (" " if len(bs) > 1 else "\n") + "dashed: above it a game has failed")
  header = ["method", "b", "updates"]
  header += [f"{KINDS[kind]}: {what}" for kind in kinds for what in ("median gap", "failed (± SD)")]
  parts.finish(workdir, fig, "gaps.png", parts.table(header, rows))


def _axis(x: str, cfg: RunConfig) -> str:
  if x == "updates":
    return "updates"
  return "preferences asked for" if cfg.table.samples else "win-rate vectors P π computed"
