"""Validation loss of each arm, and what it differs from plain attention by."""

import math

import numpy as np

from experiments.kvshift.reports.common import finish, label
from research import paths
from research import report as parts
from research.config import RunConfig


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Validation loss against steps, and the gap to plain attention seed by seed."""
  losses = parts.curves(workdir, "loss")
  data = parts.manifest(workdir)["data"]
  end = parts.final(losses)
  arms = {arm: {"validation_loss": by_seed} for arm, by_seed in end.items()}
  rows = []
  for arm, by_seed in end.items():
    values = list(by_seed.values())
    gaps = [by_seed[s] - end["plain"][s] for s in by_seed if s in end.get("plain", {})]
    arms[arm] |= {"mean": float(np.mean(values)), "minus_plain": gaps}
    gap = "" if arm == "plain" or not gaps else parts.spread(gaps)
    bits = np.mean(values) / math.log(2) / data[arm]["bytes_per_token"]["validation"]
    rows.append([label(arm), len(values), parts.spread(values), f"{bits:.4f}", gap])
  header = ["attention", "seeds", "validation loss (nats/token ± SD)", "bits/byte", "minus plain, same seed (± SD)"]
  parts.write_results(workdir, {"arms": arms, "tokens": cfg.steps * cfg.batch * cfg.length})

  gap = {arm: _difference(seeds, losses["plain"]) for arm, seeds in losses.items() if "plain" in losses}
  fig, axes = parts.figure(2 if len(gap) > 1 else 1)
  left = axes[0] if len(gap) > 1 else axes
  parts.draw(left, losses, label)
  left.set(xlabel="training step", ylabel="validation loss (nats / token)", title="Validation loss")
  left.set_ylim(*_after_start(losses))
  left.legend(frameon=False)
  if len(gap) > 1:
    parts.draw(axes[1], gap, label)
    axes[1].set(
      xlabel="training step", ylabel="loss minus plain, same seed (nats)", title="Below zero: better than plain"
    )
  fig.suptitle(f"{_describe(cfg)}: {parts.over_seeds(losses)}", fontsize=10)
  finish(workdir, fig, "validation_loss.png", parts.table(header, rows))


def _after_start(by_arm) -> tuple[float, float]:
  """Limits that show everything but the untrained model, beside which nothing else is to be seen."""
  values = [v for seeds in by_arm.values() for points in seeds.values() for step, v in points if step]
  low, high = min(values), max(values)
  margin = max(0.1 * (high - low), 1e-3)
  return low - margin, high + margin


def _difference(seeds, base):
  return {
    seed: [(step, value - dict(base[seed])[step]) for step, value in points if step in dict(base[seed])]
    for seed, points in seeds.items()
    if seed in base
  }


def _describe(cfg: RunConfig) -> str:
  tokens = cfg.steps * cfg.batch * cfg.length
  return f"{cfg.model.layers} layers, width {cfg.model.width}, {tokens:,} tokens"
