"""How often a step moves a log-probability of a pair the wrong way, as inner products say and as it turns out."""

import numpy as np

from experiments.prefgames.reports.common import by_arm, legend_below, seeds, spread
from research import paths
from research import report as parts
from research.config import RunConfig

LOSSES = {"dpo": "DPO", "ipo": "IPO", "normalised": "DPO, gradients normalised"}
WHAT = ("predicted_wrong", "wrong", "signs_predicted", "chosen_below_start", "chosen", "rejected")


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Left the first step, predicted and taken; right what a whole run does to the chosen log-probability."""
  arms = by_arm(cfg)
  found = {what: parts.curves(workdir, f"pairs/{what}") for what in WHAT}
  arms = {arm: single for arm, single in arms.items() if arm in found["wrong"]}
  first = {
    what: {arm: {seed: points[0][1] for seed, points in found[what][arm].items()} for arm in arms} for what in WHAT
  }
  last = {what: parts.final(found[what]) for what in WHAT}
  results, rows = {}, []
  for arm, single in arms.items():
    pair = single.pair
    results[arm] = {"first_step": {what: first[what][arm] for what in WHAT[:3]}}
    results[arm]["at_the_end"] = {what: last[what][arm] for what in WHAT[3:]}
    cells = [spread(first[what][arm]) for what in WHAT[:3]] + [spread(last[what][arm]) for what in WHAT[3:]]
    rows.append([LOSSES[pair.loss], pair.differ, *cells])
  parts.write_results(workdir, {"arms": results, "pairs": cfg.batch})

  fig, axes = parts.figure(3)
  mean = lambda by_seed: np.mean(list(by_seed.values()))
  for i, (loss, words) in enumerate(LOSSES.items()):
    mine = [(single.pair.differ, arm) for arm, single in arms.items() if single.pair.loss == loss]
    if not mine:
      continue
    xs = [k for k, _ in mine]
    axes[0].plot(xs, [mean(first["wrong"][arm]) for _, arm in mine], label=words, **parts.style(i))
    said = [mean(first["predicted_wrong"][arm]) for _, arm in mine]
    axes[0].plot(xs, said, "o", markersize=10, fillstyle="none", color=parts.style(i)["color"])
    axes[1].plot(xs, [mean(last["chosen_below_start"][arm]) for _, arm in mine], label=words, **parts.style(i))
    axes[2].plot(xs, [mean(last["chosen"][arm]) for _, arm in mine], **parts.style(i))
    low = parts.style(i) | {"linestyle": ":"}
    axes[2].plot(xs, [mean(last["rejected"][arm]) for _, arm in mine], **low)
  axes[0].set(title="the first step moves one of the two the wrong way\n(rings: as inner products predict)")
  axes[1].set(title="the chosen one is less probable\nafter the whole run than before it")
  axes[2].set(title="change of the chosen log-probability (dotted: rejected)\nover the whole run, nats")
  axes[2].axhline(0, color="grey", linewidth=0.8)
  for ax in axes:
    ax.title.set_fontsize(10)
    ax.set_xlabel(f"tokens of {cfg.pair.length} that differ")
  for ax in axes[:2]:
    ax.set(ylabel="share of pairs", ylim=(-0.03, 1.03))
  legend_below(fig, axes[0])
  fig.suptitle(f"{cfg.batch} pairs a seed, a policy each; means over {seeds(cfg)}", fontsize=10)
  header = ["loss", "tokens that differ", "first step wrong: predicted", "measured", "signs predicted right"]
  header += ["chosen below its start at the end", "chosen, change in nats", "rejected, change in nats"]
  parts.finish(workdir, fig, "entanglement.png", parts.table(header, rows))
