"""The theory beside a trained head: the loss of the coefficients alone, and heads made by hand."""

import jax
import numpy as np

from experiments.kvshift import theory
from experiments.kvshift.reports.common import measured
from experiments.kvshift.reports.learned import coefficients
from experiments.kvshift.tasks.induction import InductionRows
from research import config, paths
from research import report as parts
from research.config import RunConfig

OTHERS = (0, 10, 100)
WIDTHS = (4, 8, 16, 32, 64)
SIGMA = 0.05


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Contours and flow of theorem 3's loss with the trained heads' coefficients, and theorem 2's head on the task."""
  rng = np.random.default_rng(cfg.seed)
  rows = [InductionRows(cfg.induction, cfg.model.vocab, cfg.length, cfg.seed, "validation")[i] for i in range(256)]
  exact = theory.hand_built_accuracy(rows, np.eye(cfg.model.vocab), SIGMA)
  by_width = {}
  for width in WIDTHS:
    embeddings = [_unit(rng.normal(size=(cfg.model.vocab, width))) for _ in range(5)]
    by_width[width] = [theory.hand_built_accuracy(rows, e, SIGMA) for e in embeddings]
  errors = {"as defined": [], "with both ends": []}
  for _ in range(100):
    x = rng.normal(size=(int(rng.integers(4, 40)), int(rng.integers(2, 20))))
    truth = theory.induction_head(x, 1.0, 0.1)
    errors["as defined"].append(np.abs(_float64(theory.one_layer, x, 1.0, 0.1) - truth).max())
    errors["with both ends"].append(np.abs(_float64(theory.one_layer, x, 1.0, 0.1, True) - truth).max())
  metric, curves = measured(workdir)
  trained = {}
  for arm, single in config.expand(cfg):
    found = coefficients(workdir, arm, single)
    if found is not None:
      trained[f"{arm}-{single.seed}"] = [
        [float(x[0, 0, 1]) for x in ends] for ends in found
      ]  # (a1, b1) of layer 0, head 0
  results = {
    "hand_built_accuracy": {"orthonormal": exact, "random unit vectors": by_width},
    "largest_error_of_theorem_2": {name: float(np.max(e)) for name, e in errors.items()},
    "trained": {metric: parts.final(curves), "a1 and b1 at the start and the end": trained},
  }
  parts.write_results(workdir, results)

  fig, axes = parts.figure(4)
  for ax, others in zip(axes, OTHERS, strict=False):
    _flow(ax, others)
    for start, end in trained.values():
      ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": parts.COLOURS[1], "linewidth": 2}, zorder=3)
  if trained:
    axes[0].plot([], [], color=parts.COLOURS[1], linewidth=2, label="trained heads, whose sums are free")
  axes[0].legend(frameon=True, loc="lower left", fontsize=8)
  for i, embedding in enumerate(by_width):
    axes[3].plot(
      [embedding] * 5,
      by_width[embedding],
      color=parts.COLOURS[0],
      marker="o",
      linestyle="",
      label="random unit vectors" if not i else None,
    )
  axes[3].plot([cfg.model.vocab], [exact], color=parts.COLOURS[1], marker="D", linestyle="", label="orthonormal")
  axes[3].set_xscale("log")
  axes[3].set_xticks(WIDTHS, [str(w) for w in WIDTHS])
  axes[3].set_xticks([], minor=True)
  axes[3].set(xlabel="width of the embedding", ylabel="accuracy", ylim=(0, 1.03), title="Theorem 2's head, no training")
  axes[3].legend(frameon=False, loc="lower right", fontsize=8)
  table = [
    ["hand-built head, orthonormal embedding: accuracy on the task", f"{exact:.4f}"],
    ["largest error against definition 1, its two ends masked", f"{np.max(errors['as defined']):.1e}"],
    ["largest error with both ends seen, as a layer sees them", f"{np.max(errors['with both ends']):.2f}"],
    *(
      [f"trained head {name}: (a1, b1)", f"({s[0]:.2f}, {s[1]:.2f}) → ({e[0]:.2f}, {e[1]:.2f})"]
      for name, (s, e) in trained.items()
    ),
  ]
  parts.finish(workdir, fig, "theory.png", parts.table(["one layer", ""], table))


def _flow(ax, others: int) -> None:
  """Contours of the loss over (a1, b1) with sums of 1, and the lines that gradient flow takes."""
  at = np.linspace(-1, 2, 61)
  a1, b1 = np.meshgrid(at, at)
  loss = theory.flow_loss((a1, 1 - a1), (b1, 1 - b1), others)
  down_b, down_a = (-g for g in np.gradient(loss, at, at))
  ax.contour(a1, b1, loss, levels=14, cmap="Greys", linewidths=0.8)
  ax.streamplot(a1, b1, down_a, down_b, density=0.8, linewidth=0.7, arrowsize=0.8, color=parts.COLOURS[0])
  ax.plot(0, 1, "*", color=parts.COLOURS[2], markersize=14, label="ideal: (0, 1)")
  ax.set(xlabel="a1 (a2 = 1 − a1)", title=f"{others} other tokens", xlim=(-1, 2), ylim=(-1, 2))
  if others == OTHERS[0]:
    ax.set_ylabel("b1 (b2 = 1 − b1)")


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _float64(f, *args):
  with jax.enable_x64(True):
    return f(*args)
