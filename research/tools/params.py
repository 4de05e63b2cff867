"""The parameters and the FLOPs of a config, without allocating any: `python -m research.tools.params --config=...`."""

import math

import jax

from research import config, run
from research import mesh as meshes
from research.markdown import table


def main() -> None:
  args, overrides = run.parse_args(workdir=False)
  cfg = config.load(args.config, overrides)
  print("\n\n".join(describe(arm, single) for arm, single in config.expand(cfg) if single.seed == cfg.seed))


def describe(arm: str, cfg: config.RunConfig) -> str:
  """The tables of one arm: every parameter, then FLOPs by part."""
  mesh = meshes.abstract_mesh(cfg.mesh, meshes.least_devices(cfg.mesh))
  with jax.sharding.use_abstract_mesh(mesh):
    exp = config.experiment_module(cfg.experiment).build(cfg)
    model = meshes.shapes_of(exp.init)
  rows = [
    (path_name(path), "x".join(map(str, x.shape)), x.dtype, str(x.sharding.spec), f"{math.prod(x.shape):,}")
    for path, x in jax.tree_util.tree_leaves_with_path(model)
  ]
  total = sum(math.prod(x.shape) for x in jax.tree.leaves(model))
  size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(model))
  rows.append(("total", "", "", "", f"{total:,}"))
  flops = sum(exp.flops_per_token.values())
  parts = [(part, f"{f:,.0f}", f"{f / flops:.1%}") for part, f in exp.flops_per_token.items()]
  parts.append(("total", f"{flops:,.0f}", ""))
  return (
    f"{cfg.experiment}, arm {arm}: {total:,} parameters, {size / 2**20:,.1f} MiB\n\n"
    + table(["parameter", "shape", "dtype", "partition", "count"], rows)
    + "\n\n"
    + table([f"training FLOPs a token, rows of {cfg.length}", "FLOPs", "share"], parts)
  )


def path_name(path) -> str:
  """A leaf's path as dotted names: blocks.attention.qkv."""
  return ".".join(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path[:-1])


if __name__ == "__main__":
  run.guard(main)
