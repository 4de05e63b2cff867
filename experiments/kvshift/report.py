"""The figures and tables of the KV shifting configs."""

import math
import pathlib

import numpy as np

from experiments.kvshift.experiment import Config
from research import report as parts

LABELS = {
  "plain": "plain attention",
  "kvshift": "KV shifting",
  "plain-1": "plain, 1 layer",
  "plain-2": "plain, 2 layers",
  "kvshift-1": "KV shifting, 1 layer",
}


def report(workdir: pathlib.Path, cfg: Config) -> None:
  """Writes report/ of a finished workdir, and prints the table and where the figure is."""
  {"text": text_report, "induction": induction_report}[cfg.task](workdir, cfg)


def text_report(workdir: pathlib.Path, cfg: Config) -> None:
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
    rows.append([LABELS.get(arm, arm), len(values), parts.spread(values), f"{bits:.4f}", gap])
  header = ["attention", "seeds", "validation loss (nats/token ± SD)", "bits/byte", "minus plain, same seed (± SD)"]
  parts.write_results(workdir, {"arms": arms, "tokens": cfg.steps * cfg.batch * cfg.length})

  gap = {arm: _difference(seeds, losses["plain"]) for arm, seeds in losses.items() if "plain" in losses}
  fig, axes = parts.figure(2 if len(gap) > 1 else 1)
  left = axes[0] if len(gap) > 1 else axes
  parts.draw(left, losses, LABELS)
  left.set(xlabel="training step", ylabel="validation loss (nats / token)", title="Validation loss")
  left.set_ylim(*_after_start(losses))
  left.legend(frameon=False)
  if len(gap) > 1:
    parts.draw(axes[1], gap, LABELS)
    axes[1].set(
      xlabel="training step", ylabel="loss minus plain, same seed (nats)", title="Below zero: better than plain"
    )
  fig.suptitle(f"{_describe(cfg)}: {parts.over_seeds(losses)}", fontsize=10)
  _finish(workdir, fig, "validation_loss.png", parts.table(header, rows))


def induction_report(workdir: pathlib.Path, cfg: Config) -> None:
  """Accuracy on held-out rows against steps, and when 99 % is first reached."""
  accuracy = parts.curves(workdir, "accuracy")
  arms, rows = {}, []
  for arm, seeds in accuracy.items():
    last = [points[-1][1] for points in seeds.values()]
    reached = [next((step for step, a in points if a >= 0.99), None) for points in seeds.values()]
    arms[arm] = {"accuracy": dict(zip(seeds, last, strict=True)), "steps_to_99": dict(zip(seeds, reached, strict=True))}
    steps = ", ".join("never" if r is None else str(r) for r in reached)
    rows.append([LABELS.get(arm, arm), len(last), parts.spread(last), steps])
  parts.write_results(workdir, {"arms": arms})

  fig, ax = parts.figure()
  parts.draw(ax, accuracy, LABELS)
  ax.axhline(1 / cfg.induction.keys, color="grey", linestyle=":", label="guessing")
  ax.set(xlabel="training step", ylabel="accuracy on held-out rows", ylim=(0, 1.03))
  ax.set_title(f"Induction, width {cfg.model.width}: {parts.over_seeds(accuracy)}", fontsize=10)
  ax.legend(frameon=False, loc="center right")
  header = ["attention", "seeds", "accuracy at the end (± SD)", "steps to 99 %, by seed"]
  _finish(workdir, fig, "accuracy.png", parts.table(header, rows))


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


def _describe(cfg: Config) -> str:
  tokens = cfg.steps * cfg.batch * cfg.length
  return f"{cfg.model.layers} layers, width {cfg.model.width}, {tokens:,} tokens"


def _finish(workdir: pathlib.Path, fig, name: str, table: str) -> None:
  path = workdir / "report" / name
  fig.savefig(path, dpi=150)
  print(f"\n{table}\n\nfigure:  {path}\nresults: {workdir / 'report' / 'results.json'}")
