"""Many attentions side by side: what each ends with, seed by seed, as the difference to plain attention."""

from experiments.kvshift.reports.common import label
from research import comparison, paths
from research import report as parts
from research.config import RunConfig


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """A table, and a dot for each seed; to plain attention or, without that arm, to the first."""
  curves = parts.curves(workdir, "loss")
  end = parts.final(curves)
  base = "plain" if "plain" in end else next(iter(end))
  sizes = {arm: comparison.parameters(single) for arm, single in comparison.singles(cfg) if arm in end}
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

  fig = parts.dots(gaps, label, f"loss minus {label(base)}, same seed (nats / token)")
  header = ["attention", "non-embedding parameters", "validation loss (± SD)", f"minus {label(base)}, same seed (± SD)"]
  parts.finish(workdir, fig, "gaps.png", parts.table(header, rows))
