"""Trained models out of workdirs, for tools and notebooks."""

from collections.abc import Sequence
import dataclasses
import json
import os
from typing import Any

import jax

from research import config, paths
from research import mesh as meshes
from research.checkpoint import Checkpoints
from research.errors import UserError, check


def checkpoint_dir(workdir: paths.Path, arm: str, seed: int) -> paths.Path:
  """Where a single run keeps its steps."""
  return workdir / "checkpoints" / f"{arm}-{seed}"


def read_config(workdir: str | os.PathLike) -> config.RunConfig:
  """The config that a workdir's manifest records. Raises UserError."""
  path = paths.parse(workdir) / "manifest.json"
  try:
    recorded = json.loads(path.read_bytes())["config"]
    tree: dict[str, Any] = {}
    for name, value in recorded.items():
      *groups, leaf = name.split(".")
      node = tree
      for group in groups:
        node = node.setdefault(group, {})
      node[leaf] = value
    name = tree.get("experiment", "")
  except OSError:
    raise UserError("workdir", workdir, "has no manifest.json; give the directory of a run") from None
  except (ValueError, KeyError, TypeError, AttributeError):
    raise UserError("workdir", workdir, "its manifest.json is damaged") from None
  return config.freeze(config.experiment_module(name).Config, tree)


def find(workdir: str | os.PathLike, run: str | None = None) -> tuple[str, config.RunConfig]:
  """(name, config) of one of a workdir's runs, "ARM-SEED", with steps saved; None: the only one. Raises UserError."""
  workdir = paths.parse(workdir)
  cfg = dataclasses.replace(read_config(workdir), only=())  # of the last command; others may have trained other arms
  held = {f"{arm}-{one.seed}": one for arm, one in config.expand(cfg)}
  for path in (workdir / "checkpoints").glob("*"):  # seeds may have been added by a later command
    arm, _, seed = path.name.rpartition("-")
    cfg = next((c for name, c in held.items() if name.rpartition("-")[0] == arm), None)
    if path.name not in held and cfg is not None and seed.isdecimal():
      held[path.name] = dataclasses.replace(cfg, seeds=(int(seed),))
  held = {name: cfg for name, cfg in held.items() if Checkpoints(workdir / "checkpoints" / name).steps()}
  check(bool(held), "workdir", workdir, "holds no checkpoint yet")
  choices = ", ".join(held)
  if run is None:
    check(len(held) == 1, "run", "not given", f"{workdir} holds several; choose from {choices}")
    return next(iter(held.items()))
  check(run in held, "run", run, f"no such run with a checkpoint; choose from {choices}")
  return run, held[run]


def load(workdir: str | os.PathLike, run: str | None = None, overrides: Sequence[str] = ()) -> tuple[Any, Any]:
  """(config, model) of the newest step of a workdir's run ("ARM-SEED"; None: the only one).

  The model is placed on the current mesh. overrides: "path=value" items, of `mesh.`
  and of how the model is executed. Raises UserError.
  """
  workdir = paths.parse(workdir)
  name, cfg = find(workdir, run)
  cfg = config.changed(cfg, overrides)
  exp = config.experiment_module(cfg.experiment).build(cfg)
  model = meshes.on_devices(meshes.shapes_of(exp.init))
  restored = Checkpoints(workdir / "checkpoints" / name).restore({"model": model}, partial=True)
  return cfg, restored.state["model"]


def mesh(overrides: Sequence[str] = ()):
  """`with mesh(overrides):` the current mesh is the first device or, if some set `mesh.`, all devices in that shape."""
  chosen = [item.removeprefix("mesh.") for item in overrides if item.startswith("mesh.")]
  try:
    cfg = config.changed(meshes.MeshConfig(), chosen)
  except UserError as e:
    raise e.under("mesh") from None
  return jax.set_mesh(meshes.make_mesh(cfg, jax.devices() if chosen else jax.devices()[:1]))
