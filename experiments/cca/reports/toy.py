"""Where each loss ended in its world, beside guidance of every scale."""

import numpy as np

from experiments.cca.reports.common import label
from experiments.cca.toy import World, measures
from research import config, paths
from research import report as parts
from research.config import RunConfig

MEASURES = ("kl", "scale", "kl_scale", "fidelity", "entropy")


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Distance to each arm's own target, the guidance that its model is most like, and what it gives up for fidelity."""
  ended = {measure: parts.final(parts.curves(workdir, f"toy/{measure}")) for measure in MEASURES}
  arms = {
    arm: {m: {seed: ended[m][arm][seed] for seed in seeds} for m in MEASURES} for arm, seeds in ended["kl"].items()
  }
  worlds = {(arm, single.seed): World(single.toy, single.seed) for arm, single in config.expand(cfg)}
  rows = []
  for arm, found in arms.items():
    target = next(w.cfg.scale for (name, _), w in worlds.items() if name == arm)
    at = lambda name: parts.spread(list(found[name].values()))
    kl = max(found["kl"].values())
    rows.append([label(arm), f"{target:g}", f"{kl:.1e}", at("scale"), at("kl_scale"), at("fidelity"), at("entropy")])
  parts.write_results(workdir, {"arms": arms})

  seed = min(next(iter(arms.values()))["kl"])
  world = next(w for (_, of), w in worlds.items() if of == seed)
  scales = np.linspace(0, 6, 61)
  guided = [measures(world, world.guided(s)) for s in scales]
  fig, ax = parts.figure()
  fig.set_size_inches(7.2, 4.2)
  ax.plot([g["entropy"] for g in guided], [g["fidelity"] for g in guided], color="grey", label="guidance, scale 0 to 6")
  for s in (0, 1, 2, 4):
    g = measures(world, world.guided(s))
    ax.annotate(f"s = {s}", (g["entropy"], g["fidelity"]), textcoords="offset points", xytext=(4, 6), fontsize=7)
  for i, (arm, found) in enumerate(arms.items()):
    mark = parts.style(i) | {"linestyle": "none"}
    ax.plot(found["entropy"][seed], found["fidelity"][seed], label=label(arm), **mark)
  ax.set(xlabel="diversity: entropy of the samples of a class (nats)", ylabel="fidelity: log p(class | sample)")
  ax.set_title(f"Where each loss ends, seed {seed}", fontsize=10)
  ax.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
  header = ["arm", "aims at guidance", "largest KL to that", "most like guidance", "KL to it", "fidelity", "entropy"]
  parts.finish(workdir, fig, "toy.png", parts.table(header, rows))
