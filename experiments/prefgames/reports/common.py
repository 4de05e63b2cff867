"""What the reports share: names in words, and curves against updates or queries."""

from collections.abc import Mapping
import dataclasses
import itertools
import math

from experiments.prefgames.tables import fields
from research import config
from research import report as parts
from research.config import RunConfig

_NAMES = {
  "online_ipo_uniform": "online IPO, uniform pairs (OMD)",
  "online_ipo_policy": "online IPO, own pairs",
  "online_dpo": "online DPO",
  "nash_md": "Nash-MD",
  "nash_md_decay": "Nash-MD, 1/t steps",
  "nash_md_pg": "Nash-MD-PG",
  "egpo": "EGPO",
  "optimistic": "optimistic (one field an update)",
  "mmd": "magnetic mirror descent",
  "sppo": "multiplicative weights (SPO, SPPO)",
  "onpo": "ONPO",
  "mpo": "MPO (magnet moves)",
  "inpo": "INPO",
  "dpo_own": "online DPO, both from the policy",
  "dpo_reference": "online DPO, one from the reference",
  "xpo": "XPO",
  "xpo_strong": "XPO, bonus ten times as large",
  "xpo_flipped": "XPO, bonus's sign turned",
  "uniform": "DPO, both uniform",
  "online": "online: own pairs, proxy's labels",
  "online_golden": "online, golden labels",
  "offline": "offline: recorded pairs and labels",
  "offline_proxy": "offline, proxy's labels",
  "shuffled": "offline on the online run's pairs",
}
KINDS = {"uniform": "random games", "transitive": "transitive games", "cycle": "cycles, tilted references"}
FLOOR = 1e-14  # below it a gap is rounding


def label(arm: str) -> str:
  """An arm's name in words: "egpo-b1e-2" is the method and whatever the config added."""
  name, _, rest = arm.partition("-")
  name = _NAMES.get(name, name.replace("_", " "))
  return f"{name}, {rest}" if rest else name


def method(arm: str) -> str:
  """The same without what the config added."""
  return label(arm.partition("-")[0])


def by_arm(cfg: RunConfig) -> dict[str, RunConfig]:
  """The config of each arm that a workdir of `cfg` may hold, with its first seed."""
  singles = config.expand(dataclasses.replace(cfg, only=(), seeds=cfg.seeds[:1]))
  return dict(singles)


def against(curves: Mapping, arms: Mapping[str, RunConfig], x: str = "updates") -> dict:
  """Curves over steps of the loop as curves over updates, or over the preferences asked for; floored for a log axis.

  Queries of an exact update are counted in win-rate vectors P pi.
  """
  out = {}
  for arm, seeds in curves.items():
    table = arms[arm].table
    scale = table.updates
    if x == "queries":
      scale *= table.queries if table.samples else fields(table.method)
    out[arm] = {s: [(step * scale, _floored(v)) for step, v in points] for s, points in seeds.items()}
  return out


def _floored(value: float) -> float:
  return max(value, FLOOR) if math.isfinite(value) else value


def legend_below(fig, ax, columns: int = 4) -> None:
  """One legend for all panels, under them: over the data there is no room. Fewer columns where the figure is narrow."""
  columns = min(columns, int(fig.get_figwidth() / 2.5))
  fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def seeds(cfg: RunConfig) -> str:
  """How many there are, in words."""
  return f"{len(cfg.seeds)} seeds" if len(cfg.seeds) > 1 else "one seed"


def matrix(fig, ax, rates, names, errors=None) -> None:
  """Who beats whom: rates [n, n] of rows against columns in per cent, and their errors below, where there are any."""
  ax.grid(False)
  most = max(abs(rates - 0.5).max(), 0.05)
  image = ax.imshow(rates, cmap="RdBu", aspect="auto", vmin=0.5 - most, vmax=0.5 + most)
  for i, j in itertools.product(range(len(names)), repeat=2):
    told = f"{100 * rates[i, j]:.1f}" + ("" if errors is None else f"\n±{100 * errors[i, j]:.1f}")
    dark = abs(rates[i, j] - 0.5) > 0.7 * most
    ax.text(j, i, "" if i == j else told, ha="center", va="center", fontsize=7, color="white" if dark else "black")
  ax.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
  ax.set_yticks(range(len(names)), names, fontsize=8)
  ax.spines[:].set_visible(False)
  fig.colorbar(image, ax=ax, shrink=0.75, format=lambda rate, _: f"{100 * rate:.0f}")


def spread(by_seed: Mapping[int, float]) -> str:
  """'mean ± standard deviation' over seeds."""
  return parts.spread(list(by_seed.values()))


def scientific(by_seed: Mapping[int, float]) -> str:
  """The smallest and the largest over seeds, for what spans orders of magnitude."""
  values = [v for v in by_seed.values() if math.isfinite(v)]
  return f"{min(values):.0e} to {max(values):.0e}" if values else "not finite"
