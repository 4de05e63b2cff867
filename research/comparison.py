"""Reports that compare arms: their parameters, their losses against steps, the gap to one of them seed by seed."""

from collections.abc import Callable, Collection, Iterator
import dataclasses
import math

import jax
import numpy as np

from research import config, paths
from research import mesh as meshes
from research import report as parts
from research.config import RunConfig


def singles(cfg: RunConfig) -> Iterator[tuple[str, RunConfig]]:
  """(arm, config) of every run a workdir of `cfg` may hold: also of arms that an earlier command trained."""
  yield from config.expand(dataclasses.replace(cfg, only=()))


def parameters(cfg: RunConfig, without: Collection[str] = ("embed", "head")) -> int:
  """Parameters of a config's model but for those under the names `without`; nothing is allocated."""
  with jax.sharding.use_abstract_mesh(meshes.abstract_mesh(cfg.mesh, meshes.least_devices(cfg.mesh))):
    init = config.experiment_module(cfg.experiment).build(cfg).init
    model = meshes.shapes_of(init)
  leaves = jax.tree_util.tree_leaves_with_path(model)
  return sum(x.size for path, x in leaves if not set(without) & {getattr(k, "name", "") for k in path})


def losses(workdir: paths.Path, cfg: RunConfig, *, base: str, label: Callable[[str], str]) -> None:
  """A report: validation loss against steps, and the gap to the arm `base`, where there is one, seed by seed.

  label: an arm's name -> in words.
  """
  curves = parts.curves(workdir, "loss")
  data = parts.manifest(workdir)["data"]
  end = parts.final(curves)
  arms = {arm: {"validation_loss": by_seed} for arm, by_seed in end.items()}
  rows = []
  for arm, by_seed in end.items():
    values = list(by_seed.values())
    gaps = [by_seed[s] - end[base][s] for s in by_seed if s in end.get(base, {})]
    arms[arm] |= {"mean": float(np.mean(values)), f"minus_{base}": gaps}
    gap = "" if arm == base or not gaps else parts.spread(gaps)
    bits = np.mean(values) / math.log(2) / data[arm]["bytes_per_token"]["validation"]
    rows.append([label(arm), len(values), parts.spread(values), f"{bits:.4f}", gap])
  header = ["arm", "seeds", "validation loss (nats/token ± SD)", "bits/byte", f"minus {base}, same seed (± SD)"]
  parts.write_results(workdir, {"arms": arms, "tokens": cfg.steps * cfg.batch * cfg.length})

  gap = {arm: _difference(seeds, curves[base]) for arm, seeds in curves.items() if base in curves}
  fig, axes = parts.figure(2 if len(gap) > 1 else 1)
  left = axes[0] if len(gap) > 1 else axes
  parts.draw(left, curves, label)
  left.set(xlabel="training step", ylabel="validation loss (nats / token)", title="Validation loss")
  left.set_ylim(*_after_start(curves))
  left.legend(frameon=False)
  if len(gap) > 1:
    parts.draw(axes[1], gap, label)
    ylabel = f"loss minus {base}, same seed (nats)"
    axes[1].set(xlabel="training step", ylabel=ylabel, title=f"Below zero: better than {base}")
  fig.suptitle(f"{_describe(cfg)}: {parts.over_seeds(curves)}", fontsize=10)
  parts.finish(workdir, fig, "validation_loss.png", parts.table(header, rows))


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
