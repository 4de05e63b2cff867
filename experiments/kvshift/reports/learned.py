"""What KV shifting learnt: its coefficients as in the paper's table 4, and by layer."""

from typing import Any

import jax
import numpy as np

from research import config, fit, paths, runs
from research import report as parts
from research.config import RunConfig

# the paper: 2.9B parameters, 128 key-value heads
PAPER = (50, 17, 9, 52)
CASES = ("a1 > a2, b1 > b2", "a1 ≤ a2, b1 > b2", "a1 > a2, b1 ≤ b2", "a1 ≤ a2, b1 ≤ b2")


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Counts of all heads of all seeds, before and after training, and both differences by layer."""
  kept = {(arm, single.seed): coefficients(workdir, arm, single) for arm, single in config.expand(cfg)}
  kept = {name: found for name, found in kept.items() if found is not None}
  before, after = (
    [sum(np.array(counts(found[i])) for found in kept.values()).tolist() for i in (0, 1)] if kept else ([0] * 4,) * 2
  )
  rows = [
    [case, f"{p} ({p / 128:.0%})", f"{b} ({b / max(sum(before), 1):.0%})", f"{a} ({a / max(sum(after), 1):.0%})"]
    for case, p, b, a in zip(CASES, PAPER, before, after, strict=True)
  ]
  runs_ = {
    f"{arm}-{seed}": {"key": end[0].tolist(), "value": end[1].tolist(), "counts": list(counts(end))}
    for (arm, seed), (_, end) in kept.items()
  }
  parts.write_results(workdir, {"cases": CASES, "before": before, "after": after, "coefficients": runs_})

  fig, axes = parts.figure(2)
  for ax, i, name in zip(axes, (0, 1), ("key: a1 − a2", "value: b1 − b2"), strict=True):
    for j, ((_, seed), (_, end)) in enumerate(kept.items()):
      difference = end[i][..., 1] - end[i][..., 0]  # [layers, heads]
      layers = np.broadcast_to(np.arange(len(difference))[:, None], difference.shape)
      at = layers + 0.12 * (j - (len(kept) - 1) / 2)  # beside each other
      look = parts.style(j) | {"linestyle": "", "alpha": 0.7}
      ax.plot(at.ravel(), difference.ravel(), label=f"seed {seed}", **look)
    if kept:
      ends = [end[i][..., 1] - end[i][..., 0] for _, end in kept.values()]
      ax.plot(range(len(ends[0])), np.mean(ends, axis=(0, 2)), color="black", linewidth=1, label="mean")
      ax.set_xticks(range(len(ends[0])))
    ax.axhline(0, color="grey", linewidth=1)
    ax.set(xlabel="layer", title=name)
  axes[0].set_ylabel("current minus previous token's coefficient")
  fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
  header = ["coefficients of a head", "paper, 2.9B", "here, at the start (¼ each is expected)", "here, trained"]
  parts.finish(workdir, fig, "coefficients.png", parts.table(header, rows))


def coefficients(workdir: paths.Path, arm: str, cfg: RunConfig) -> Any:
  """(key, value) at the start and the same at the end, each [layers, kv_heads, (previous, current)]; None: no shift."""
  build = config.experiment_module(cfg.experiment).build
  with runs.mesh():
    start = jax.jit(lambda key: fit.init_state(build(cfg), key).model)(jax.random.key(cfg.seed))
    if getattr(start.blocks.attention.mix, "key", None) is None:
      return None
    _, end = runs.load(workdir, f"{arm}-{cfg.seed}")
  return tuple(
    tuple(np.asarray(x[...]) for x in (m.key, m.value)) for m in (start.blocks.attention.mix, end.blocks.attention.mix)
  )


def counts(found: tuple[np.ndarray, np.ndarray]) -> tuple[int, ...]:
  """How many heads fall into each of `CASES`."""
  key, value = (x[..., 1] > x[..., 0] for x in found)
  return tuple(int(n.sum()) for n in (key & value, ~key & value, key & ~value, ~key & ~value))
