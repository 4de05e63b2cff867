"""What an optimiser does to the last policy: each method under each rule, at its best learning rate."""

import math

import numpy as np

from experiments.prefgames.reports.common import (
  FLOOR,
  KINDS,
  against,
  by_arm,
  method,
  scientific,
  spread,
)
from research import paths
from research import report as parts
from research.config import RunConfig

_RULES = {
  "sgd": "SGD",
  "momentum": "momentum 0.9",
  "adam": "Adam",
  "adam_b1_0": "Adam, β1 = 0",
  "optimistic": "optimistic SGD",
  "optimistic_adam": "optimistic Adam",
}


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """A panel a method; every rule at the learning rate that ends with the fewest failures, then the smallest gap."""
  (kind,) = cfg.table.kinds
  results, rows, best = {}, [], {}
  for arm, single in by_arm(cfg).items():
    gaps = {rate: parts.curves(workdir, f"{kind}/gap@{rate:g}") for rate in single.table.rates}
    if not all(arm in found for found in gaps.values()):
      continue
    failed = {r: parts.final(parts.curves(workdir, f"{kind}/failed@{r:g}"))[arm] for r in gaps}
    ends = {r: parts.final(found)[arm] for r, found in gaps.items()}
    worth = lambda r, failed=failed, ends=ends: (np.mean(list(failed[r].values())), _log_mean(ends[r].values()))
    rate = min(gaps, key=worth)
    best[arm] = against({arm: gaps[rate][arm]}, {arm: single})[arm]
    results[arm] = {"best_rate": rate, "failed": failed[rate], "median_gap": ends[rate]}
    results[arm]["failed_by_rate"] = {f"{r:g}": failed[r] for r in gaps}
    rule = _RULES[single.table.rule]
    rows.append([method(arm), rule, f"{rate:g}", spread(failed[rate]), scientific(ends[rate])])
  parts.write_results(workdir, {"arms": results, "games": cfg.batch})

  methods = list(dict.fromkeys(arm.partition("-")[0] for arm in best))
  fig, axes = parts.figure(len(methods))
  for ax, name in zip(np.atleast_1d(axes), methods, strict=True):
    mine = {arm: curve for arm, curve in best.items() if arm.partition("-")[0] == name}
    parts.draw(ax, mine, lambda arm: f"{_RULES[arm.partition('-')[2]]}, lr {results[arm]['best_rate']:g}")
    ax.set(yscale="log", xlabel="updates", title=method(name))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=8)
  np.atleast_1d(axes)[0].set_ylabel("duality gap, median over games")
  fig.suptitle(
    f"{KINDS[kind]}, b = {cfg.table.b:g}, each rule at its best learning rate; {parts.over_seeds(best)}", fontsize=10
  )
  header = ["method", "rule", "best learning rate", "failed (± SD)", "median gap"]
  parts.finish(workdir, fig, "optimisers.png", parts.table(header, rows))


def _log_mean(values) -> float:
  return float(np.mean([math.log(max(v, FLOOR)) if math.isfinite(v) else math.inf for v in values]))
