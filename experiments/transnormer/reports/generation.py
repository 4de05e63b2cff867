"""What a token costs to generate, against the length of the text before it."""

from typing import Any

import jax
import numpy as np

from experiments.transnormer import decoding
from experiments.transnormer.reports.common import label
from research import config, paths, runs
from research import report as parts
from research.config import RunConfig
from research.kernels.dispatch import platform

CONTEXTS = (1, 4, 16, 64, 256)  # rows' lengths
TOKENS, TURNS = 8, 3


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Milliseconds a token and megabytes of the cache, of every arm and seed."""
  contexts = [n * cfg.length for n in CONTEXTS]
  with runs.mesh():
    models = {(arm, one.seed): runs.load(workdir, f"{arm}-{one.seed}")[1] for arm, one in config.expand(cfg)}
    measured = [measure(models, context) for context in contexts]
    arms = list(dict.fromkeys(arm for arm, _ in models))
    first = {arm: models[arm, cfg.seed] for arm in arms}
    megabytes = {arm: [decoding.size(model, n) / 1e6 for n in contexts] for arm, model in first.items()}
  parameters = {arm: sum(x.size for x in jax.tree.leaves(model)) for arm, model in first.items()}
  ms = {arm: {seed: [at[arm, seed] for at in measured] for seed in cfg.seeds} for arm in arms}
  on_cpu = platform() == "cpu"
  results = {
    "timing": {"rows": decoding.ROWS, "tokens": TOKENS, "turns": TURNS, "clock": "processor" if on_cpu else "wall"},
    "tokens_before": contexts,
    "arms": {a: {"parameters": parameters[a], "milliseconds": ms[a], "megabytes": megabytes[a]} for a in arms},
  }
  parts.write_results(workdir, results)

  fig, axes = parts.figure(2)
  time = {arm: {seed: list(zip(contexts, y, strict=True)) for seed, y in seeds.items()} for arm, seeds in ms.items()}
  parts.draw(axes[0], time, label)
  parts.draw(axes[1], {arm: {0: list(zip(contexts, y, strict=True))} for arm, y in megabytes.items()}, label)
  axes[0].set(title="Time of a token", ylabel="processor time, ms a token" if on_cpu else "ms a token")
  axes[1].set(title="Memory of the cache", ylabel="MB")
  for ax in axes:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(contexts, [f"{n // 1024}k" if n >= 1024 else str(n) for n in contexts])
    ax.set(xlabel="tokens before it")
  axes[0].legend(frameon=False)
  sizes = " and ".join(f"{n / 1e6:.2f}M" for n in parameters.values())
  fig.suptitle(f"Decoding {decoding.ROWS} row, {sizes} parameters: {parts.over_seeds(time)}", fontsize=10)
  rows = [
    [label(arm), f"{context:,}", parts.spread([y[i] for y in ms[arm].values()]), f"{megabytes[arm][i]:,.2f}"]
    for arm in arms
    for i, context in enumerate(contexts)
  ]
  parts.finish(workdir, fig, "generation.png", parts.table(["arm", "tokens before it", "ms a token", "MB"], rows))


def measure(models: dict[Any, Any], context: int) -> dict[Any, float]:
  """{name: milliseconds a token after `context` tokens}, the least of the turns that the models take."""
  program, seconds = decoding.Decoding(context, TOKENS), {}
  for name, model in models.items():
    program(model)  # compiles
    seconds[name] = np.inf
  for _ in range(TURNS):
    for name, model in models.items():  # in turn: noise of the machine meets all, and only adds
      seconds[name] = min(seconds[name], program(model))
  return {name: 1e3 * s for name, s in seconds.items()}
