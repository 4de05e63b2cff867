"""Figures, tables and `results.json` from a workdir's JSON lines. Shared by the experiments' reports."""

from collections.abc import Callable, Mapping, Sequence
import json
import math
import os
import shlex
from typing import Any

import numpy as np

from research import paths, writers
from research.errors import check
from research.markdown import table as table  # reports have all of their parts from here

# Okabe and Ito's palette: told apart by everyone, and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"  # one more than colours: no two of a figure share both


def curves(
  workdir: paths.Path, metric: str, kind: str = "eval", needed: bool = True
) -> dict[str, dict[int, list[tuple[int, float]]]]:
  """{arm: {seed: [(step, value), ...]}} of a metric in `metrics.jsonl`; non-finite values are nan.

  Raises UserError if a `needed` metric is nowhere.
  """
  out: dict = {}
  for r in writers.read(workdir / "metrics.jsonl"):
    if r["kind"] == kind and metric in r:
      value = float("nan") if r[metric] is None else r[metric]
      out.setdefault(r["arm"], {}).setdefault(r["seed"], []).append((r["step"], value))
  check(
    bool(out) or not needed,
    "workdir",
    workdir,
    f"its metrics.jsonl has no {kind} line with {metric}; use another --workdir",
  )
  return out


def style(i: int) -> dict[str, Any]:
  """Colour, marker and line of the i-th thing in a figure: 18 that can be told apart."""
  line = ("-", "--", ":")[i // len(COLOURS) % 3]
  return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": line, "markersize": 4}


def draw(
  ax, by_arm: Mapping[str, Mapping[int, Sequence[tuple[int, float]]]], label: Callable[[str], str] = str
) -> None:
  """One line an arm, named by `label(arm)`: the mean over seeds, in a band from the smallest to the largest."""
  for i, (arm, seeds) in enumerate(by_arm.items()):
    steps = sorted(set.intersection(*({step for step, _ in points} for points in seeds.values())))
    values = np.array([[dict(points)[step] for step in steps] for points in seeds.values()])
    ax.plot(steps, values.mean(0), markevery=max(len(steps) // 12, 1), label=label(arm), **style(i))
    ax.fill_between(steps, values.min(0), values.max(0), color=style(i)["color"], alpha=0.2, linewidth=0)


def figure(columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
  """A matplotlib figure of `columns` panels side by side in each of `rows` and its axes, in the house style."""
  # here: half a second that a run needs at its end, and not at its start
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  fig = Figure(figsize=(0.8 + 4.6 * columns, 0.4 + 3.4 * rows), layout="constrained")
  FigureCanvasAgg(fig)
  axes = fig.subplots(rows, columns)
  for ax in np.ravel(axes):
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
  return fig, axes


def dots(values: Mapping[str, Sequence[float]], label: Callable[[str], str], xlabel: str) -> Any:
  """A row for each arm, named by `label(arm)`: a dot for each of its values, a bar for their mean, and a line at 0."""
  fig, ax = figure()
  fig.set_figheight(1.2 + 0.3 * len(values))
  for i, of_arm in enumerate(values.values()):
    ax.plot(of_arm, [i] * len(of_arm), "o", color=COLOURS[0], markersize=4, alpha=0.7)
    ax.plot(np.mean(of_arm), i, "|", color=COLOURS[1], markersize=16, markeredgewidth=2)
  ax.axvline(0, color="grey", linewidth=1)
  ax.set_yticks(range(len(values)), [label(arm) for arm in values], fontsize=8)
  ax.invert_yaxis()
  ax.set_xlabel(xlabel, fontsize=9)
  ax.set_title("a dot a seed, a bar their mean; left is better", fontsize=10)
  return fig


def image_grid(path: str | os.PathLike, images: np.ndarray, columns: int, scale: int = 1) -> None:
  """Writes a PNG of images [n, height, width, 1 or 3 channels] in [-1, 1], row by row, each pixel `scale` wide."""
  from matplotlib.image import imsave

  n, height, width, channels = images.shape
  rows = -(-n // columns)
  grid = np.full((rows * columns, height + 1, width + 1, channels), 1.0, np.float32)  # a line between images
  grid[:n, :height, :width] = np.clip(images, -1, 1)
  grid = grid.reshape(rows, columns, height + 1, width + 1, channels).swapaxes(1, 2)
  grid = grid.reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1]
  grid = np.broadcast_to(grid, (*grid.shape[:2], 3)).repeat(scale, 0).repeat(scale, 1)
  imsave(path, np.round((grid + 1) * 127.5).astype(np.uint8), format="png")


def over_seeds(by_arm: Mapping[str, Mapping[int, Any]]) -> str:
  """What a line and its band show, for a title."""
  counts = {len(seeds) for seeds in by_arm.values()}
  most = max(counts)
  return "one seed" if counts == {1} else f"mean and range over {'up to ' if len(counts) > 1 else ''}{most} seeds"


def final(by_arm: Mapping[str, Mapping[int, Sequence[tuple[int, float]]]]) -> dict[str, dict[int, float]]:
  """{arm: {seed: the last value}}."""
  return {arm: {seed: points[-1][1] for seed, points in seeds.items()} for arm, seeds in by_arm.items()}


def spread(values: Sequence[float]) -> str:
  """'mean ± standard deviation' over seeds (n - 1 in the denominator), or the one value."""
  return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def manifest(workdir: paths.Path) -> dict[str, Any]:
  """The workdir's manifest."""
  return json.loads((workdir / "manifest.json").read_text())


def write_results(workdir: paths.Path, results: Mapping[str, Any]) -> paths.Path:
  """Writes `report/results.json`: the results and where they come from. Returns its path.

  A number that is not finite becomes null.
  """
  about = manifest(workdir)
  launch = about["launches"][-1]
  settings = [f"--config.{override}" for override in launch["overrides"]]
  record = {
    "command": shlex.join(
      ["python", "-m", f"experiments.{about['config']['experiment']}", launch["config"], *settings]
    ),
    "commit": launch["git"],
    "launches": len(about["launches"]),
    "seeds": sorted({r["seed"] for r in writers.read(workdir / "metrics.jsonl")}),
    "hardware": {**launch["host"], "devices": launch["devices"]},
    "python": launch["python"],
    "versions": launch["versions"],
    "data": about["data"],
    "results": results,
  }
  path = workdir / "report" / "results.json"
  path.write_text(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")
  return path


def finish(workdir: paths.Path, fig: Any, name: str, table: str) -> None:
  """Writes the figure to report/`name` and prints the table and where everything is."""
  path = workdir / "report" / name
  with path.open("wb") as file:
    fig.savefig(file, dpi=150, format=path.suffix[1:])
  print(f"\n{table}\n\nfigure:  {path}\nresults: {workdir / 'report' / 'results.json'}")


def _finite(x: Any) -> Any:
  """The same with None for every number that is not finite: JSON has no NaN."""
  if isinstance(x, Mapping):
    return {key: _finite(value) for key, value in x.items()}
  if isinstance(x, list | tuple):
    return [_finite(value) for value in x]
  return None if isinstance(x, float) and not math.isfinite(x) else x
