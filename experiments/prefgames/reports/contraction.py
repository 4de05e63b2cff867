"""EGPO's theorem as a certificate: KL(equilibrium || policy) shrinks by (1 - eta b) in every update, in every game."""

import numpy as np

from experiments.prefgames.reports.common import FLOOR, by_arm, seeds
from research import paths
from research import report as parts
from research.config import RunConfig

ROUNDING = 1e-6  # of a ratio of two KL divergences of 1e-10 and more


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """A panel a b: KL against updates, with the theorem's line; the table has the worst ratio of any update and game."""
  results, rows = {}, []
  arms = by_arm(cfg)
  fig, axes = parts.figure(len(arms))
  for ax, (arm, single) in zip(np.atleast_1d(axes), arms.items(), strict=True):
    table = single.table
    results[arm] = {"b": table.b, "by_eta": {}}
    for i, eta in enumerate(table.rates):
      ratios = parts.curves(workdir, f"contraction@{eta:g}", kind="train").get(arm, {})
      worst = {
        seed: max((v for _, v in points), key=lambda v: np.inf if np.isnan(v) else v) for seed, points in ratios.items()
      }
      bound = 1 - eta * table.b
      holds = all(v <= bound + ROUNDING for v in worst.values())
      results[arm]["by_eta"][f"{eta:g}"] = {"worst_ratio": worst, "bound": bound, "holds": holds}
      seen = f"{max(worst.values(), default=np.nan):.4f}"
      condition = "yes" if eta <= 1 / (table.b + 3) * (1 + 1e-3) else "no"
      rows.append([f"{table.b:g}", f"{eta:g}", condition, f"{bound:.4f}", seen, "yes" if holds else "no"])
      kl = parts.curves(workdir, f"uniform/kl@{eta:g}").get(arm, {})
      curves = {seed: [(step * table.updates, max(v, FLOOR)) for step, v in points] for seed, points in kl.items()}
      steps = np.array([x for x, _ in next(iter(curves.values()))])
      values = np.array([[v for _, v in points] for points in curves.values()])
      style = parts.style(i)
      ax.plot(steps, values.mean(0), label=f"η = {eta:g}", markevery=max(len(steps) // 8, 1), **style)
      if bound > 0:
        ax.plot(steps, values[:, 0].mean() * bound**steps, color=style["color"], linestyle=":", linewidth=1)
    ax.set(yscale="log", ylim=(FLOOR / 2, 1e2), xlabel="updates", title=f"b = {table.b:g}")
    ax.legend(frameon=False, fontsize=8)
  np.atleast_1d(axes)[0].set_ylabel("KL(equilibrium ‖ policy), median over games")
  fig.suptitle(
    f"EGPO, {cfg.batch} random games a seed, mean of {seeds(cfg)}; dotted: (1 − η b) to the updates",
    fontsize=10,
  )
  parts.write_results(workdir, {"arms": results, "games": cfg.batch})
  header = [
    "b",
    "η",
    "η ≤ 1/(b + 3)",
    "1 − η b",
    "worst ratio of one update, any game and seed",
    "held in every update",
  ]
  parts.finish(workdir, fig, "contraction.png", parts.table(header, rows))
