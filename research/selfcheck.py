"""Before the first step, on the run's own config and mesh: is what is fast also right?

Each check computes something twice on a few rows of the first batch: as the run will, and in the slowest, plainest way
there is. `run --selfcheck` refuses to start where two differ. What a check does not apply to (a model without a cache,
one device, one process) it leaves out, and says so.
"""

from collections.abc import Callable, Iterator
import dataclasses
import hashlib
import itertools
import math
from typing import Any

import jax
from jax import numpy as jnp
from jax.experimental import multihost_utils
import numpy as np

from research import config, fit
from research import mesh as meshes
from research.config import RunConfig
from research.errors import UserError
from research.fit import Experiment
from research.kernels.dispatch import batch_shards

ROWS = 2  # for each of the mesh's slices of a batch
DECODED = 8  # tokens decoded one by one
BATCHES = 50  # among which a row with two documents is looked for
TOLERANCE = {"float32": 2e-4, "float64": 1e-9, "bfloat16": 4e-2}  # relative, by the precision of the computation


@dataclasses.dataclass(frozen=True)
class Check:
  """What was compared; its largest relative difference, or why it was not made (`skipped`)."""

  name: str
  difference: float = 0.0
  tolerance: float = 0.0
  skipped: str = ""


def selfcheck(
  build: Callable[[RunConfig], Experiment],
  cfg: RunConfig,
  exp: Experiment,
  init_from: Callable[[Any], Any] | None = None,
  say: Callable[[str], None] = print,
) -> None:
  """Makes every check of a single run, under its mesh; `say` hears of each. Raises UserError at the first mismatch."""
  abstract = fit.abstract_state(exp)
  model = fit.start_model(exp, cfg, meshes.on_devices(abstract), init_from)
  reference = fit.frozen(exp, cfg, abstract, init_from)
  batch = _rows(exp, model, reference)
  left_out = []
  for check in _checks(build, cfg, exp, model, batch, reference):
    if check.skipped:
      left_out.append(f"{check.name} ({check.skipped})")
      continue
    say(f"selfcheck: {check.name}: {check.difference:.1e}, allowed {check.tolerance:g}")
    if check.difference > check.tolerance:
      fix = f"differ by {check.difference:.2g}, more than {check.tolerance:g}; nothing was trained"
      raise UserError("selfcheck", check.name, fix)
  if left_out:
    say(f"selfcheck: nothing to compare: {'; '.join(left_out)}")


def _checks(build, cfg: RunConfig, exp: Experiment, model, batch, reference) -> Iterator[Check]:
  if exp.reference:
    starts = reference if exp.companion is None else reference[0]
    same = jax.tree.map(lambda a, b: jnp.all(a == b), model, starts)
    differing = sum(not bool(x) for x in jax.tree.leaves(jax.block_until_ready(same)))
    yield Check("reference against the start", float(differing), 0.0)
  ours = _loss_and_norm(exp, model, batch, reference)
  yield _kernel(build, cfg, model, batch, reference, ours)
  yield _unsharded(build, cfg, model, batch, reference, ours)
  yield _unpacked(cfg, exp, model, batch, reference)
  yield _decoded(cfg, model, batch)
  yield _disjoint(exp)


def _kernel(build, cfg, model, batch, reference, ours) -> Check:
  name = "kernel against its reference"
  has = "attention_kernel" in {f.name for f in dataclasses.fields(cfg.model)} if hasattr(cfg, "model") else False
  if not has:
    return Check(name, skipped="this model chooses no kernel")
  field = next(f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) is cfg.model)  # not always "model"
  plain = build(config.changed(cfg, [f"{field}.attention_kernel=reference"]))
  like = jax.tree.structure(fit.abstract_state(plain).model)  # a model's structure says how it is executed
  if like == jax.tree.structure(model):
    return Check(name, skipped="this model has no attention, or asks for the reference")
  dressed = lambda model: jax.tree.unflatten(like, jax.tree.leaves(model))
  if plain.companion is not None:
    reference = (dressed(reference[0]) if plain.reference else None, reference[1])
  elif plain.reference:
    reference = dressed(reference)
  model = dressed(model)
  return Check(name, _apart(ours, _loss_and_norm(plain, model, batch, reference)), _tolerance(cfg))


def _unsharded(build, cfg, model, batch, reference, ours) -> Check:
  name = "sharded against one device"
  if jax.sharding.get_mesh().size == 1:
    return Check(name, skipped="the mesh is one device")
  alone = config.changed(cfg, ["mesh.replica=1", "mesh.data=1", "mesh.model=1"])
  specs = [x.sharding.spec for x in jax.tree.leaves((model, reference))]
  held, rows = _whole((model, reference)), _whole(meshes.to_devices(batch))
  mesh = meshes.make_mesh(alone.mesh, jax.local_devices()[:1])
  with jax.set_mesh(mesh):
    put = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip(held, specs, strict=True)]
    model, reference = jax.tree.unflatten(jax.tree.structure((model, reference)), put)
    batch = jax.tree.unflatten(jax.tree.structure(batch), rows)
    theirs = _loss_and_norm(build(alone), model, batch, reference)
  return Check(name, _apart(ours, theirs), _tolerance(cfg))


def _unpacked(cfg, exp, model, batch, reference) -> Check:
  name = "packed against one document a row"
  if not {"segment_ids", "positions", "tokens"} <= batch.keys():
    return Check(name, skipped="rows hold one thing each")
  row = {k: x[0] for k, x in batch.items()}
  segments = np.unique(row["segment_ids"][row["segment_ids"] > 0])
  if not np.all(multihost_utils.process_allgather(np.int32(len(segments) > 1))):
    return Check(name, skipped=f"no row of the first {BATCHES} batches holds two documents")
  n = len(next(iter(batch.values())))
  packed = {k: np.stack([x] * n) for k, x in row.items()}
  packed["weights"] = packed["weights"] * np.isin(packed["segment_ids"], segments)
  packed["weights"][1:] = 0
  together, apart = _mean(exp, model, packed, reference), []
  for segment in segments:
    at = row["segment_ids"] == segment
    alone = {k: np.stack([np.pad(x[at], (0, len(at) - at.sum()))] * n) for k, x in row.items()}
    alone["segment_ids"] = (alone["segment_ids"] > 0).astype(np.int32)
    alone["weights"][1:] = 0
    apart.append(_mean(exp, model, alone, reference))
  total, weight = (float(sum(x[i] for x in apart)) for i in (0, 1))
  return Check(name, _apart([together[0] / together[1]], [total / weight]), _tolerance(cfg))


def _decoded(cfg, model, batch) -> Check:
  name = "decoding against the forward pass"
  if not all(hasattr(model, part) for part in ("prefill", "extend", "unembed")) or "positions" not in batch:
    return Check(name, skipped="this model has no cache")
  length = min(batch["tokens"].shape[1], 64)
  tokens = batch["tokens"][:, :length]
  ids = np.ones_like(tokens)
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
  rows = meshes.to_devices({"t": tokens, "s": ids, "p": np.array(positions)})
  split = max(length - DECODED, 1)

  def forward(model, rows):
    return model.unembed(model(rows["t"], rows["s"], rows["p"]))[:, split - 1 :]

  def decode(model, rows):
    cut = lambda lo, hi: tuple(rows[k][:, lo:hi] for k in "tsp")
    x, cache = model.prefill(*cut(0, split), length)
    out = [model.unembed(x)[:, -1:]]
    for i in range(split, length):
      x, cache = model.extend(*cut(i, i + 1), cache)
      out.append(model.unembed(x))
    return jnp.concatenate(out, axis=1)

  full, cached = (jax.block_until_ready(jax.jit(f)(model, rows)) for f in (forward, decode))
  worst = jax.jit(lambda a, b: jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(a)), 1e-6))(full, cached)
  return Check(name, float(worst), _tolerance(cfg))


def _disjoint(exp) -> Check:
  name = "rows of different processes"
  if jax.process_count() == 1:
    return Check(name, skipped="there is one process")
  shard, _ = meshes.batch_shard(jax.sharding.get_mesh())
  batch = next(iter(exp.data("train")))
  rows = [
    hashlib.sha256(b"".join(x[i].tobytes() for x in batch.values())).digest()[:8] for i in range(len(batch["weights"]))
  ]
  mine = np.array([[shard, *np.frombuffer(row, np.uint32)] for row in rows], np.uint32)
  if not multihost_utils.process_allgather(np.int32(len(set(rows)) == len(rows))).all():
    return Check(name, skipped="rows are not all different")
  holders: dict[tuple, set] = {}
  for holder, *row in multihost_utils.process_allgather(mine).reshape(-1, 3).tolist():
    holders.setdefault(tuple(row), set()).add(holder)
  return Check(name, float(sum(len(of) > 1 for of in holders.values())), 0.0)


def _rows(exp: Experiment, model: Any, reference: Any) -> dict[str, np.ndarray]:
  """A few rows of this process's part of the first batch; the first of them, if there is any, with two documents."""
  data = exp.data("train")
  whole = next(iter(data))
  _, count = meshes.batch_shard(jax.sharding.get_mesh())
  rows = {name: x[: ROWS * batch_shards() // count].copy() for name, x in whole.items()}
  for batch in itertools.islice(data, BATCHES) if "segment_ids" in whole else ():
    found = [i for i, ids in enumerate(batch["segment_ids"]) if len(np.unique(ids[ids > 0])) > 1]
    if found:
      for name, x in rows.items():
        x[0] = batch[name][found[0]]
      break
  try:  # a batch may have to be whole
    jax.eval_shape(exp.loss, model, meshes.to_devices(rows), jax.random.key(0), *fit.if_any(reference))
  except (TypeError, ValueError):
    return dict(whole)
  return rows


def _tolerance(cfg: RunConfig) -> float:
  precision = getattr(getattr(cfg, "model", None), "precision", "float32")
  return TOLERANCE["float64" if cfg.x64 else "float32" if precision == "float32" else "bfloat16"]


def _mean(exp: Experiment, model, batch, reference) -> tuple[float, float]:
  """(total, weight) of the loss."""
  rest = fit.if_any(reference)
  f = jax.jit(lambda model, batch: exp.loss(model, batch, jax.random.key(0), *rest)["loss"])
  mean = jax.block_until_ready(f(model, meshes.to_devices(batch)))
  return float(mean.total), float(mean.weight)


def _loss_and_norm(exp: Experiment, model, batch, reference) -> list[float]:
  """[mean loss, norm of its gradients] of a batch."""
  rest = fit.if_any(reference)

  def f(model, batch):
    leaves, tree = jax.tree.flatten(model)
    moves = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]

    def loss(floats):
      floats = iter(floats)
      whole = [next(floats) if m else x for x, m in zip(leaves, moves, strict=True)]
      return exp.loss(jax.tree.unflatten(tree, whole), batch, jax.random.key(0), *rest)["loss"].value

    value, grads = jax.value_and_grad(loss)([x for x, m in zip(leaves, moves, strict=True) if m])
    return value, jnp.sqrt(sum((jnp.sum(jnp.square(g.astype(jnp.float32))) for g in grads), 0.0))

  return [float(x) for x in jax.block_until_ready(jax.jit(f)(model, meshes.to_devices(batch)))]


def _whole(tree: Any) -> list[np.ndarray]:
  """The leaves as arrays of this host."""
  if jax.process_count() == 1:
    return jax.tree.leaves(jax.device_get(tree))
  return [np.asarray(x) for x in jax.tree.leaves(multihost_utils.process_allgather(tree, tiled=True))]


def _apart(a: list[float], b: list[float]) -> float:
  """The largest relative difference; infinite where one is not a number."""
  pairs = [abs(x - y) / max(abs(x), abs(y), 1e-6) for x, y in zip(a, b, strict=True)]
  return max(pair if math.isfinite(pair) else math.inf for pair in pairs)
