"""The paper's trade-off on images: how real samples are, how sure a classifier is of them, and what they cost."""

from collections.abc import Iterator
import dataclasses
import statistics
import time
from typing import Any

import numpy as np

from experiments.cca import evaluation
from experiments.cca.reports.common import label
from research import comparison, paths, runs, writers
from research import report as parts
from research.config import RunConfig

BASE, COLUMNS = "model", 12
TURNS = 9  # of timing
SHOWN = ("frechet", "kernel_distance", "class_score", "judge_accuracy", "precision", "recall", "density", "coverage")
SHOWN += ("diversity",)
LIKELIHOODS = {
  "nll": "nats a token, class",
  "nll_null": "null class",
  "reward_pos": "reward, class",
  "reward_neg": "other classes",
  "reward_accuracy": "first above second",
  "accuracy": "accuracy as a classifier",
}
WORDS = {
  "frechet": "Fréchet classifier distance",
  "kernel_distance": "kernel distance",
  "class_score": "classifier score",
  "judge_accuracy": "judged as asked for",
}


@dataclasses.dataclass(frozen=True)
class Setting:
  """One way to make samples: an arm at a scale of guidance. values: {measure: {seed: value}}."""

  arm: str
  scale: float
  tune: Any
  values: dict[str, dict[int, float]]

  @property
  def kind(self) -> str:
    """The curve that it belongs to."""
    if self.arm == BASE:
      return "CFG" if self.scale else "no guidance"
    return f"{label(self.tune.method)} + CFG" if self.scale else label(self.tune.method)

  @property
  def name(self) -> str:
    if self.arm == BASE:
      return f"CFG, s = {self.scale:g}" if self.scale else "no guidance"
    t = self.tune
    lam = {"cca": f", λ = {t.lam:g}", "unlearning": f", λ = {t.lam:g}", "ddo": f", λ = {t.lam:g}"}.get(t.method, "")
    beta = "" if t.method == "unlearning" else f", β = {t.beta:g}"
    return label(t.method) + lam + beta + (f" + CFG, s = {self.scale:g}" if self.scale else "")

  def mean(self, measure: str) -> float:
    return float(np.mean(list(self.values[measure].values())))

  def deviation(self, measure: str) -> float:
    """That of the tables: over seeds, n - 1 in the denominator."""
    values = list(self.values[measure].values())
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Figures and tables of what has been trained so far; with a tokenizer only, what it does to images."""
  with runs.mesh():
    grids(workdir, cfg)
    found, reals = settings(workdir, cfg)
    cost = sampling_cost(workdir, cfg) if found else {}
  accuracy = parts.final(parts.curves(workdir, "accuracy", needed=False))
  likely = {m: parts.final(parts.curves(workdir, f"likelihood/{m}", needed=False)) for m in LIKELIHOODS}
  results = {
    "samples": cfg.evaluation.samples,
    "features": cfg.classifier.features,
    "accuracy": accuracy,
    "real": reals,
    "settings": {s.name: {"arm": s.arm, "scale": s.scale} | s.values for s in found},
    "cost": cost,
    "likelihood": likely,
  }
  parts.write_results(workdir, results)
  if not found:
    pixels = parts.final(parts.curves(workdir, "pixels", needed=False))
    print(f"\nheld-out squared error of the tokenizer: {pixels}\nresults: {workdir / 'report' / 'results.json'}")
    return
  print(cost_table(cost))
  print(likelihood_table(found, likely) + "\n")
  print(
    parts.table(["classifier", "held-out accuracy"], [[a, parts.spread(list(v.values()))] for a, v in accuracy.items()])
  )
  parts.finish(workdir, tradeoff(found, reals, cfg), "tradeoff.png", quality(found, reals, cost))


def settings(workdir: paths.Path, cfg: RunConfig) -> tuple[list[Setting], dict[str, dict[str, dict[int, float]]]]:
  """(every setting that was sampled, {"floor", "ceiling" or "codes": {measure: {seed: value}}})."""
  last = {(r["arm"], r["seed"]): r for r in writers.read(workdir / "metrics.jsonl") if r["kind"] == "eval"}
  tunes = {arm: single.tune for arm, single in comparison.singles(cfg)}
  found: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
  for (arm, seed), record in last.items():
    for key, value in record.items():
      if key.startswith("samples/"):
        _, of, measure = key.split("/")
        arms = (arm, of) if of[0].isdigit() else ("", of)
        found.setdefault(arms, {}).setdefault(measure, {})[seed] = value
  made = [Setting(arm, float(of), tunes[arm], values) for (arm, of), values in found.items() if arm in tunes]
  return made, {of: values for (arm, of), values in found.items() if not arm}


def sampling_cost(workdir: paths.Path, cfg: RunConfig) -> dict[str, Any]:
  """What it costs to draw many images from the base model, without guidance and with it, in turn: medians.

  The codes alone, without decoding, which costs both the same. processor: the time of all threads together, which
  other programs on the machine do not lengthen.
  """
  if not runs.checkpoint_dir(workdir, BASE, cfg.seed).is_dir():
    return {}
  model, book = runs.load(workdir, f"{BASE}-{cfg.seed}")[1], runs.load(workdir, f"tokenizer-{cfg.seed}")[1].tokenizer
  labels = evaluation.asked(cfg, cfg.evaluation.timed)
  clocks = {"wall": time.perf_counter, "processor": time.process_time}
  took: dict[tuple[str, str], list[float]] = {}
  for turn in range(TURNS + 1):
    for name, scale in (("free", 0.0), ("guided", 1.0)):
      started = {clock: now() for clock, now in clocks.items()}
      evaluation.draw(model, book, labels, scale, turn)
      for clock, now in clocks.items():
        took.setdefault((clock, name), []).append(1e3 * (now() - started[clock]) / len(labels))
  median = {key: statistics.median(ms[1:]) for key, ms in took.items()}  # the first turn compiles
  each = lambda clock: {name: median[clock, name] for name in ("free", "guided")}
  return {
    "images": len(labels),
    "turns": TURNS,
    "forward_tokens": {"free": cfg.model.tokens, "guided": 2 * cfg.model.tokens},
    "milliseconds": {clock: each(clock) for clock in clocks},
    "ratio": {clock: median[clock, "guided"] / median[clock, "free"] for clock in clocks},
  }


def cost_table(cost: dict[str, Any]) -> str:
  """What an image costs."""
  if not cost:
    return ""
  header, rows = ["sampling", "forward tokens an image"], []
  for clock in cost["milliseconds"]:
    header += [f"{clock} time, ms an image ({cost['images']:,} at once)", "relative"]
  for key, name in (("free", "guidance-free"), ("guided", "guided")):
    times = [(f"{ms[key]:.3f}", f"{ms[key] / ms['free']:.2f}") for ms in cost["milliseconds"].values()]
    rows.append([name, cost["forward_tokens"][key], *sum(times, ())])
  return "\n" + parts.table(header, rows) + "\n"


def likelihood_table(found: list[Setting], likely: dict[str, dict[str, dict[int, float]]]) -> str:
  """What held-out images are worth to each model, guided or not: exact."""
  names = {s.arm: s.name for s in found if not s.scale}
  cell = lambda m, arm: parts.spread(list(likely[m][arm].values())) if arm in likely[m] else ""
  rows = [[name, *(cell(m, arm) for m in LIKELIHOODS)] for arm, name in names.items()]
  return parts.table(["model", *LIKELIHOODS.values()], rows)


def quality(found: list[Setting], reals: dict[str, Any], cost: dict[str, Any]) -> str:
  """A row for each setting, and the floor and ceiling of the distances."""
  header = ["method", "forward tokens", *(WORDS.get(m, m) for m in SHOWN)]
  words = {"floor": "real training images", "codes": "the same, encoded and decoded", "ceiling": "pixels shuffled"}
  cell = lambda values, m: parts.spread(list(values[m].values())) if m in values else ""
  tokens = cost.get("forward_tokens", {"free": "", "guided": ""})
  rows = [[words[of], "", *(cell(reals[of], m) for m in SHOWN)] for of in words]
  rows += [[s.name, tokens["guided" if s.scale else "free"], *(cell(s.values, m) for m in SHOWN)] for s in found]
  return parts.table(header, rows)


def tradeoff(found: list[Setting], reals: dict[str, Any], cfg: RunConfig) -> Any:
  """Distance against the classifier's score, and against what the judge says; a point a setting, its bars the seeds."""
  fig, axes = parts.figure(2)
  floor = np.mean(list(reals["floor"]["frechet"].values()))
  curves, points = [], []
  for name, of in _groups(found):
    (curves if len(of) > 1 else points).append((name, of))
  for ax, across in zip(axes, ("class_score", "judge_accuracy"), strict=True):
    for i, (name, of) in enumerate(curves + points):
      x, y = ([s.mean(m) for s in of] for m in (across, "frechet"))
      bars = [[s.deviation(m) for s in of] for m in (across, "frechet")]
      mark = parts.style(i) | {"markersize": 5}
      if len(of) == 1:  # hollow, so that no mark is there twice
        mark |= {"linestyle": "none", "markerfacecolor": "white", "markersize": 7}
      ax.errorbar(x, y, xerr=bars[0], yerr=bars[1], label=name, elinewidth=0.5, **mark)
      for s in of if i < 2 and len(of) > 1 else ():
        at, up = (s.mean(across), s.mean("frechet")), 5 if i else -10
        text = f"{_along(name, s):g}"
        ax.annotate(text, at, textcoords="offset points", xytext=(3, up), fontsize=6, color=mark["color"])
    ax.axhline(floor, color="grey", linewidth=1, linestyle=":", label="real training images")
    ax.set_yscale("log")
    ticks = [t for t in (0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20) if ax.get_ylim()[0] <= t <= ax.get_ylim()[1]]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.set_yticks([], minor=True)
    ax.set(xlabel=WORDS[across], ylabel=WORDS["frechet"])
  axes[0].set_title("the paper's trade-off: right and down is better", fontsize=9)
  axes[1].set_title("classes as a second classifier sees them", fontsize=9)
  axes[1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
  fig.set_size_inches(11.5, 4.4)
  seeds = parts.over_seeds({s.name: s.values["frechet"] for s in found}).replace("range", "deviation")
  fig.suptitle(f"{cfg.evaluation.samples} samples each, against held-out images: {seeds}", fontsize=10)
  return fig


def _groups(found: list[Setting]) -> Iterator[tuple[str, list[Setting]]]:
  """What is drawn as one curve or point, under its name."""
  base = [s for s in found if s.arm == BASE]
  if base:
    yield "CFG, over the scale", sorted(base, key=lambda s: s.scale)
  cca = [s for s in found if s.tune.method == "cca" and s.arm.startswith("cca-")]
  betas = [s.tune.beta for s in cca]
  common = max(betas, key=betas.count) if cca else None
  over_lam = [s for s in cca if s.tune.beta == common]
  if over_lam:
    yield f"CCA over λ, β = {common:g}", sorted(over_lam, key=lambda s: s.tune.lam)
  shared = {s.tune.lam for s in cca if s.tune.beta != common}
  for lam in sorted(shared):
    yield f"CCA over β, λ = {lam:g}", sorted((s for s in cca if s.tune.lam == lam), key=lambda s: s.tune.beta)
  others: dict[str, list[Setting]] = {}
  for s in found:
    if s.arm != BASE and s not in cca:
      others.setdefault(s.arm, []).append(s)
  for of in others.values():
    of.sort(key=lambda s: s.scale)
    yield of[0].name + (" + CFG over the scale" if len(of) > 1 else ""), of


def _along(name: str, s: Setting) -> float:
  """What changes along a curve."""
  return s.tune.lam if "over λ" in name else s.tune.beta if "over β" in name else s.scale


def grids(workdir: paths.Path, cfg: RunConfig) -> None:
  """PNGs of the first seed: held-out images beside what the tokenizer makes of them, and samples, a row a class."""
  held = {arm for arm, single in comparison.singles(cfg) if runs.checkpoint_dir(workdir, arm, single.seed).is_dir()}
  if "tokenizer" not in held:
    return
  book = runs.load(workdir, f"tokenizer-{cfg.seed}")[1].tokenizer
  real = evaluation.real(cfg.data)["validation"]["images"][: 5 * COLUMNS]
  pairs = np.stack(
    [real.reshape(-1, COLUMNS, *real.shape[1:]), evaluation.recoded(book, real).reshape(-1, COLUMNS, *real.shape[1:])],
    1,
  )
  parts.image_grid(workdir / "report" / "reconstructions.png", pairs.reshape(-1, *real.shape[1:]), COLUMNS, scale=6)
  for arm, single in comparison.singles(cfg):
    if arm in held and single.seed == cfg.seed and single.task in ("model", "tune"):
      model = runs.load(workdir, f"{arm}-{cfg.seed}")[1]
      for scale in single.evaluation.scales:
        _grid(workdir, cfg, model, book, arm, scale)


def _grid(workdir, cfg, model, book, arm, scale) -> None:
  labels = evaluation.asked(cfg, cfg.evaluation.samples)
  made = evaluation.decoded(book, evaluation.draw(model, book, labels, scale, cfg.seed))
  rows = [made[labels == c][:COLUMNS] for c in range(cfg.model.classes)]
  name = f"samples_{arm}" + (f"_s{scale:g}" if scale else "")
  parts.image_grid(workdir / "report" / f"{name.replace('.', '_')}.png", np.concatenate(rows), len(rows[0]), scale=6)
