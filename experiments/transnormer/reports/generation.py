"""What a token costs to generate, against the length of the text before it."""

import statistics
from typing import Any

import jax

from experiments.transnormer import decoding
from experiments.transnormer.reports.common import label
from research import config, paths, runs
from research import report as parts
from research.config import RunConfig
from research.kernels.dispatch import platform

CONTEXTS = (1, 4, 16, 64, 256)  # rows' lengths
TOKENS, TURNS = 8, 5


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Milliseconds a token and megabytes of the cache of every arm, whose first seed is timed."""
  by_arm = {arm: [] for arm, _ in config.expand(cfg)}
  with runs.mesh():
    models = {arm: runs.load(workdir, f"{arm}-{cfg.seed}")[1] for arm in by_arm}
    for context in [n * cfg.length for n in CONTEXTS]:
      for arm, found in measure(models, context).items():
        by_arm[arm].append(found)
  parameters = {arm: sum(x.size for x in jax.tree.leaves(model)) for arm, model in models.items()}
  timing = {
    "rows": decoding.ROWS,
    "tokens_a_turn": TOKENS,
    "turns": TURNS,
    "clock": "processor" if platform() == "cpu" else "wall",
  }
  parts.write_results(workdir, {"parameters": parameters, "timing": timing, "arms": by_arm})

  fig, axes = parts.figure(2)
  panels = (
    ("ms", "processor time, ms a token" if platform() == "cpu" else "ms a token", "Time of a token"),
    ("megabytes", "MB", "Memory of the cache"),
  )
  for ax, (name, unit, title) in zip(axes, panels, strict=True):
    for i, (arm, found) in enumerate(by_arm.items()):
      ax.plot([f["context"] for f in found], [f[name] for f in found], label=label(arm), **parts.style(i))
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    at = [n * cfg.length for n in CONTEXTS]
    ax.set_xticks(at, [_short(n) for n in at])
    ax.set(xlabel="tokens before it", ylabel=unit, title=title)
  axes[0].legend(frameon=False)
  sizes = " and ".join(f"{n / 1e6:.2f}M" for n in parameters.values())
  told = f"the least of {TURNS} turns of {TOKENS} tokens"
  fig.suptitle(f"Decoding {decoding.ROWS} row, {sizes} parameters, {jax.devices()[0].device_kind}: {told}", fontsize=10)
  rows = [
    [label(arm), f"{f['context']:,}", f"{f['ms']:.2f}", f"{1e3 / f['ms']:,.1f}", f"{f['megabytes']:,.2f}"]
    for arm, found in by_arm.items()
    for f in found
  ]
  header = ["arm", "tokens before it", "ms a token", "tokens/s", "MB of cache"]
  parts.finish(workdir, fig, "generation.png", parts.table(header, rows))


def measure(models: dict[str, Any], context: int) -> dict[str, dict[str, float]]:
  """{arm: its numbers after `context` tokens}. The arms take turns: noise of the machine meets all."""
  programs = {arm: decoding.Decoding(model, context, TOKENS) for arm, model in models.items()}
  seconds = {arm: [] for arm in programs}
  for turn in range(1 + TURNS):
    for arm, program in programs.items():
      took = program()
      if turn:  # the first compiles
        seconds[arm].append(took)
  return {
    arm: {
      "context": context,
      "ms": 1e3 * min(seconds[arm]),  # what else runs on the machine only adds
      "median_ms": 1e3 * statistics.median(seconds[arm]),
      "megabytes": decoding.size(model, context) / 1e6,
    }
    for arm, model in models.items()
  }


def _short(n: int) -> str:
  return f"{n // 1024}k" if n >= 1024 else str(n)
