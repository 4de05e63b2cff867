"""Optimisers by name: an optax chain of clipping, update rule, weight decay and schedule."""

import dataclasses
import math
from typing import Literal

from flax import nnx
import jax
import optax

from research.errors import check


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW or Muon under a warm-up and a constant, cosine or warm-up-stable-decay schedule.

  Weight decay applies to parameters whose metadata says `matrix` or `table` (weights,
  embeddings), not to norms, biases and per-head scalars. `decay` is the fraction of the run in which
  `wsd` falls (linearly) to `final`, a fraction of `lr`, as does `cosine`. `moments` is the dtype
  of the first moment, to save memory; the second stays float32, as bfloat16 would not see its small changes.
  """

  name: Literal["adamw", "muon"] = "adamw"
  lr: float = 1e-3
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip: float = 1.0  # largest global norm of the gradients; 0: no clipping
  schedule: Literal["constant", "cosine", "wsd"] = "cosine"
  warmup: int = 100  # steps of linear warm-up
  decay: float = 0.2
  final: float = 0.1
  moments: Literal["float32", "bfloat16"] = "float32"

  def __post_init__(self):
    for name in ("lr", "eps"):
      check(getattr(self, name) > 0, name, getattr(self, name), "must be positive, e.g. 3e-4")
    for name in ("b1", "b2"):
      check(0 <= getattr(self, name) < 1, name, getattr(self, name), "must lie in [0, 1)")
    for name in ("weight_decay", "clip", "warmup"):
      check(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
    for name in ("decay", "final"):
      check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must lie in [0, 1]")


def schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
  """The learning rate by step: linear warm-up to cfg.lr, then cfg.schedule until `steps`."""
  peak, rest = cfg.lr, max(steps - cfg.warmup, 1)
  if cfg.schedule == "constant":
    after = optax.constant_schedule(peak)
  elif cfg.schedule == "cosine":
    after = optax.cosine_decay_schedule(peak, rest, cfg.final)
  else:
    fall = min(max(round(cfg.decay * steps), 1), rest)
    after = optax.join_schedules(
      [optax.constant_schedule(peak), optax.linear_schedule(peak, peak * cfg.final, fall)], [rest - fall]
    )
  # Step 0 already moves: the warm-up starts at peak / warmup, not at zero.
  warm = optax.linear_schedule(peak / max(cfg.warmup, 1), peak, max(cfg.warmup - 1, 1))
  return optax.join_schedules([warm, after], [cfg.warmup])


def make(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """The optax chain of `cfg` for a run of `steps` steps over a tree of nnx modules."""

  def decays(model):
    return _label(model, lambda meta: "matrix" in meta or "table" in meta)

  return optax.chain(
    optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity(),
    _muon(cfg) if cfg.name == "muon" else _adam(cfg),
    optax.add_decayed_weights(cfg.weight_decay, decays),
    optax.scale_by_learning_rate(schedule(cfg, steps)),
  )


def _variables(model) -> list[nnx.Variable]:
  """The variables of `model`, less those that optax has masked out."""
  leaves = jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, nnx.Variable))
  return [v for v in leaves if jax.tree.leaves(v)]


def _label(model, f):
  """A tree like `model` with `f(metadata of the parameter)` at each array."""
  return jax.tree.unflatten(jax.tree.structure(model), [f(v.get_metadata()) for v in _variables(model)])


def _adam(cfg: OptimizerConfig) -> optax.GradientTransformation:
  return optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=cfg.moments)


def _muon(cfg: OptimizerConfig) -> optax.GradientTransformation:
  """Muon (Jordan et al., 2024) on the matrices of the layers, Adam on the rest.

  Parameters name their (input axes, output axes) in the metadata `matrix`; other
  axes (layers, heads) are batch axes. Updates of matrices get Adam's usual root
  mean square of 0.2 (Liu et al., 2025, arXiv 2502.16982), so that both share one
  learning rate and weight decay.
  """

  def axes(model):
    return _label(model, lambda meta: optax.contrib.MuonDimensionNumbers(*meta["matrix"]))

  def scale(x, numbers):
    fans = [math.prod(x.shape[axis] for axis in axes) for axes in numbers]
    return 0.2 * max(fans) ** 0.5 * x

  muon = optax.chain(
    optax.contrib.scale_by_muon(mu_dtype=cfg.moments, weight_dimension_numbers=axes),
    optax.stateless(lambda updates, params: jax.tree.map(scale, updates, axes(updates))),
  )

  def update(updates, state, params=None):
    # Newton-Schulz contracts whichever axes are sharded: leave the collectives to the compiler.
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
    return jax.sharding.auto_axes(muon.update, out_sharding=specs)(updates, state)

  rules = {
    "muon": optax.GradientTransformation(muon.init, update),
    "adam": _adam(cfg),
  }
  return optax.partition(rules, lambda model: _label(model, lambda meta: "muon" if "matrix" in meta else "adam"))
