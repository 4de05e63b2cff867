"""Many attentions side by side: what each ends with, seed by seed, as the difference to plain attention."""

import numpy as np

from experiments.kvshift.reports.common import finish, label, singles
from experiments.kvshift.reports.sweep import non_embedding
from research import paths
from research import report as parts
from research.config import RunConfig


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """A table, and a dot for each seed; to plain attention or, without that arm, to the first."""
  curves = parts.curves(workdir, "loss")
  end = parts.final(curves)
  base = "plain" if "plain" in end else next(iter(end))
  sizes = {arm: non_embedding(single) for arm, single in singles(cfg) if arm in end}
  arms, rows, gaps = {}, [], {}
  for arm, by_seed in end.items():
    gaps[arm] = [value - end[base][seed] for seed, value in by_seed.items() if seed in end[base]]
    extra = sizes[arm] - sizes[base]
    arms[arm] = {"validation_loss": by_seed, f"minus_{base}": gaps[arm], "extra_parameters": extra}
    gap = "" if arm == base or not gaps[arm] else parts.spread(gaps[arm])
    rows.append(
      [label(arm), f"{extra:+,}" if arm != base else f"{sizes[arm]:,}", parts.spread(list(by_seed.values())), gap]
    )
  parts.write_results(workdir, {"arms": arms, "tokens": cfg.steps * cfg.batch * cfg.length})

  fig, ax = parts.figure()
  fig.set_figheight(1.2 + 0.3 * len(end))
  for i, arm in enumerate(end):
    ax.plot(gaps[arm], [i] * len(gaps[arm]), "o", color=parts.COLOURS[0], markersize=4, alpha=0.7)
    ax.plot(np.mean(gaps[arm]), i, "|", color=parts.COLOURS[1], markersize=16, markeredgewidth=2)
  ax.axvline(0, color="grey", linewidth=1)
  ax.set_yticks(range(len(end)), [label(arm) for arm in end], fontsize=8)
  ax.invert_yaxis()
  ax.set_xlabel(f"loss minus {label(base)}, same seed (nats / token)", fontsize=9)
  ax.set_title("a dot a seed, a bar their mean; left is better", fontsize=10)
  header = ["attention", "non-embedding parameters", "validation loss (± SD)", f"minus {label(base)}, same seed (± SD)"]
  finish(workdir, fig, "gaps.png", parts.table(header, rows))
