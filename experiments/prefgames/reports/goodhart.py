"""What a policy wins by the golden preference against the KL it pays, online and offline."""

import numpy as np

from experiments.prefgames.reports.common import by_arm, legend_below, method, seeds, spread
from research import paths
from research import report as parts
from research.config import RunConfig

WHAT = ("win_rate", "kl", "classified")


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """A panel a tau: the path of each arm from the reference on; the table has the most it wins, and its end."""
  arms, taus = by_arm(cfg), cfg.strings.taus
  found = {(what, tau): parts.curves(workdir, f"golden/{what}@{tau:g}") for what in WHAT for tau in taus}
  arms = [arm for arm in arms if arm in found["win_rate", taus[0]]]
  results, rows = {}, []
  for arm in arms:
    ends = {what: {f"{tau:g}": parts.final(found[what, tau])[arm] for tau in taus} for what in WHAT}
    most = {
      seed: max(v for tau in taus for _, v in found["win_rate", tau][arm][seed])
      for seed in found["win_rate", taus[0]][arm]
    }
    results[arm] = {"most_won": most, "at_the_end": ends}
    last = f"{taus[-1]:g}"
    rows.append([method(arm), spread(most), *(spread(ends[what][last]) for what in WHAT)])
  parts.write_results(workdir, {"arms": results, "worlds": cfg.batch})

  fig, axes = parts.figure(len(taus))
  for ax, tau in zip(np.atleast_1d(axes), taus, strict=True):
    for i, arm in enumerate(arms):
      wins, kl = (
        np.mean([[v for _, v in points] for points in found[what, tau][arm].values()], axis=0)
        for what in ("win_rate", "kl")
      )
      ax.plot(kl, wins, label=method(arm), markevery=max(len(kl) // 8, 1), **parts.style(i))
    ax.set(title=f"τ = {tau:g}", xlabel="KL to the reference, nats")
  np.atleast_1d(axes)[0].set_ylabel("golden win rate against the reference")
  legend_below(fig, np.atleast_1d(axes)[0], 3)
  fig.suptitle(f"IPO; {cfg.batch} worlds a seed, means over {seeds(cfg)}; a line is a run, from the left", fontsize=10)
  header = ["pairs and labels", "most won, any tau and time (± SD)"]
  header += [
    f"{words} at the end, τ = {taus[-1]:g}" for words in ("win rate", "KL", "recorded labels classified right")
  ]
  parts.finish(workdir, fig, "goodhart.png", parts.table(header, rows))
