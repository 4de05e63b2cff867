"""The paper's ablations: what each costs in bits, beside the paper's number."""

import math

from experiments.transnormer.reports.common import label
from research import comparison, paths
from research import report as parts
from research.config import RunConfig

BASE = "base"
# Loss of 385M parameters after 100k updates, tables 4 to 12 of arXiv 2405.18371: in bits, as 2^loss is the perplexity.
PAPER = {
  "base": 2.248,
  "ape": 2.387,
  "decay_only": 2.267,
  "lrpe_only": 2.287,
  "lrpe_d": 2.236,
  "no_temperature": 2.258,
  "no_gate": 2.263,
  "no_activation": 2.283,
  "1_plus_elu": 2.252,
  "glu_swish": 2.254,
  "rms": 2.247,
  "layer": 2.247,
}


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """A table, and a dot for each seed with the paper's gap beside it; to the base or, without that arm, to the first."""
  curves = parts.curves(workdir, "loss")
  end = {arm: {s: x / math.log(2) for s, x in seeds.items()} for arm, seeds in parts.final(curves).items()}
  base = BASE if BASE in end else next(iter(end))
  sizes = {arm: comparison.parameters(single, ()) for arm, single in comparison.singles(cfg) if arm in end}
  arms, rows, gaps = {}, [], {}
  for arm, by_seed in end.items():
    gaps[arm] = [x - end[base][seed] for seed, x in by_seed.items() if seed in end[base]]
    theirs = PAPER[arm] - PAPER[base] if arm in PAPER and base in PAPER else None
    arms[arm] = {"loss_bits": by_seed, f"minus_{base}": gaps[arm], "parameters": sizes[arm], "paper_gap_bits": theirs}
    first = arm == base
    gap = "" if first or not gaps[arm] else parts.spread(gaps[arm])
    paper = [f"{PAPER[arm]:.3f}" if arm in PAPER else "", "" if first or theirs is None else f"{theirs:+.3f}"]
    rows.append(
      [label(arm), f"{sizes[arm]:,}", *paper, parts.spread(list(by_seed.values())), gap, _same(theirs, gaps[arm])]
    )
  parts.write_results(workdir, {"arms": arms, "base": base, "tokens": cfg.steps * cfg.batch * cfg.length})

  fig = parts.dots(gaps, label, f"loss minus {base}, same seed (bits / token)")
  [ax] = fig.axes
  theirs = [(arms[arm]["paper_gap_bits"], i) for i, arm in enumerate(gaps) if arm != base]
  points = [point for point in theirs if point[0] is not None]
  if points:
    ax.plot(*zip(*points, strict=True), "D", markerfacecolor="none", color=parts.COLOURS[2], markersize=6)
    ax.set_title("")
    fig.suptitle("a dot a seed, a bar their mean, a diamond the paper's 385M; left is better", fontsize=10)
  header = ["arm", "parameters", "paper (bits)", f"minus {base}", "ours (bits / token ± SD)"]
  header += [f"minus {base}, same seed (± SD)", "same side"]
  parts.finish(workdir, fig, "ablations.png", parts.table(header, rows))


def _same(theirs: float | None, ours: list[float]) -> str:
  """Whether our seeds, all of them, lie on the paper's side of the base."""
  if not theirs or not ours:
    return ""
  same = [gap * theirs > 0 for gap in ours]
  return "yes" if all(same) else "no" if not any(same) else "seeds differ"
