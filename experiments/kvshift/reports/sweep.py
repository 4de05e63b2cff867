"""What each attention ends with, against the setting that a config sweeps."""

import math

import numpy as np

from experiments.kvshift.reports.common import MEASURES, label, measured
from research import comparison, config, paths
from research import report as parts
from research.config import RunConfig

_WORDS = {"params": "non-embedding parameters", "model.width": "width", "tx.lr": "learning rate"}


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Final accuracy or loss against `cfg.sweep`, by attention: arms are named <attention>-<anything>."""
  metric, curves = measured(workdir)
  end = parts.final(curves)
  # skip_nonfinite lets a sweep go on; a run with an update left out has diverged all the same
  for arm, seeds in parts.curves(workdir, "loss", kind="train", needed=False).items():
    for seed, points in seeds.items():
      if not all(math.isfinite(value) for _, value in points) and arm in end:
        end[arm][seed] = math.nan
  at = {arm: _value(single, cfg.sweep) for arm, single in comparison.singles(cfg) if arm in end}
  arms, series = {}, {}
  for arm, by_seed in end.items():
    arms[arm] = {cfg.sweep: at[arm], metric: by_seed}
    series.setdefault(arm.partition("-")[0], {})[at[arm]] = list(by_seed.values())
  name = _WORDS.get(cfg.sweep, cfg.sweep)
  values = sorted({x for points in series.values() for x in points})
  rows = [
    [f"{x:,}" if isinstance(x, int) else f"{x:g}", *(_cell(points.get(x)) for points in series.values())]
    for x in values
  ]
  parts.write_results(workdir, {"arms": arms})

  fig, ax = parts.figure()
  for i, (attention, points) in enumerate(series.items()):
    xs = sorted(points)
    finite = [[v for v in points[x] if math.isfinite(v)] for x in xs]
    mean = [np.mean(v) if v else math.nan for v in finite]
    reach = [[m - min(v, default=m) for m, v in zip(mean, finite, strict=True)]]
    reach += [[max(v, default=m) - m for m, v in zip(mean, finite, strict=True)]]
    ax.errorbar(xs, mean, yerr=reach, capsize=3, label=label(attention), **parts.style(i))
  if len(values) > 1 and values[0] > 0 and values[-1] / values[0] > 5:
    ax.set_xscale("log")
  ax.set_xticks(values, [f"{x:,}" if isinstance(x, int) else f"{x:g}" for x in values], fontsize=8)
  ax.set_xticks([], minor=True)
  ax.set(xlabel=name, ylabel=MEASURES[metric])
  if metric != "loss":
    ax.set_ylim(-0.03, 1.03)
  ax.set_title(f"{cfg.task}: {parts.over_seeds(curves)}", fontsize=10)
  ax.legend(frameon=False, fontsize=8)
  header = [name, *(f"{label(attention)} (± SD)" for attention in series)]
  parts.finish(workdir, fig, "sweep.png", parts.table(header, rows))


def _cell(values: list[float] | None) -> str:
  if not values:
    return ""
  finite = [v for v in values if math.isfinite(v)]
  lost = f" ({len(values) - len(finite)} of {len(values)} diverged)" if len(finite) < len(values) else ""
  return (parts.spread(finite) if finite else "") + lost


def _value(cfg: RunConfig, field: str) -> int | float:
  # without the coefficients of the attention, so that arms of one size stand at one place
  return comparison.parameters(cfg, ("embed", "head", "mix")) if field == "params" else config.flat(cfg)[field]
