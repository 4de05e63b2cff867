"""Compiles a config for a pod, by its real compiler on this machine, and counts what it would need and do there."""

import dataclasses
import math
import re
import time
from typing import Any

import jax
from jax import numpy as jnp
from jax.extend.core import Var

from launch import counts as program
from launch import hlo, ptx, topology
from launch.topology import Topology
from research import config
from research.errors import UserError, check
from research.fit import (
  Experiment,
  TrainState,
  abstract_batch,
  abstract_reference,
  abstract_state,
  if_any,
  jit_step,
)
from research.kernels.attention import splash
from research.kernels.lightning_attention import pallas_gpu
from research.mesh import BATCH, on_devices
from research.tools.params import path_name

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device. `needed` may be all that is known of a program that does not fit."""

  limit: float
  needed: float
  parameters: float
  optimizer: float
  batch: float
  activations: float  # what the forward pass keeps for the backward pass
  temporaries: float  # the rest: gradients, gathered weights, buffers

  compiled: bool  # whether the compiler took it

  @property
  def fits(self) -> bool:
    return self.compiled and self.needed <= self.limit


@dataclasses.dataclass(frozen=True)
class Plan:
  """One arm of a config on one pod."""

  config: str
  arm: str
  what: str
  topology: str
  chips: int
  devices: int
  mesh: dict[str, int]
  tokens: int  # of a step
  model_flops: float  # of a step, all devices: matrix products of the model, no recomputation
  memory: Memory
  largest: list[tuple[str, float]]  # the largest buffers by name, bytes on one device
  fixes: list[tuple[str, bool, float]]  # (overrides, fits, bytes needed), as tried
  compile_seconds: float
  counts: program.Counts | None = None  # of one device; None where it does not fit
  link_seconds: float = 0.0
  step_seconds: float = 0.0  # no less
  registers: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # of Triton kernels, see launch.ptx

  @property
  def mfu(self) -> float:
    """Model FLOPs over what all chips could do in `step_seconds`: no more."""
    return self.model_flops / (self.step_seconds * self.chips * topology.CHIPS[self.topology.split(":")[0]].flops)


def plan(spec: str, arm: str, cfg: config.RunConfig, pod: Topology, what: str = "train", fixes: bool = True) -> Plan:
  """Compiles one arm of a config for `pod`. Raises UserError for what cannot be planned.

  fixes: where it does not fit, look for the cheapest change that does.
  """
  check_batch(cfg, pod)
  mesh = topology.make_mesh(cfg.mesh, pod)
  with jax.set_mesh(mesh):
    exp = config.experiment_module(cfg.experiment).build(cfg)
    state, batch = on_devices(abstract_state(exp)), on_devices(abstract_batch(exp))
    start = time.perf_counter()
    if what == "train":
      reference = abstract_reference(exp, state)
      lowered = jit_step(exp, cfg, state).lower(state, batch, reference)
      kept = residuals(exp, cfg, state, batch)
      tokens, model_flops = cfg.batch * cfg.length, sum(exp.flops_per_token.values()) * cfg.batch * cfg.length
      inputs = {"parameters": (state.model, reference), "optimizer": (state.opt, state.step), "batch": batch}
    else:
      lowered, cache = lower_decode(exp, cfg, state)
      kept = []
      tokens, model_flops = cfg.batch, 0.0  # utilisation says nothing of a step that waits for memory
      inputs = {"parameters": state.model, "optimizer": (), "batch": cache}
    compiled, needed = compile_for(lowered)
  seconds = time.perf_counter() - start
  parts = {name: sum(shard_bytes(x) for x in jax.tree.leaves(tree)) for name, tree in inputs.items()}
  parts["activations"] = sum(size for _, size in kept)
  if compiled is not None:
    stats = compiled.memory_analysis()
    needed = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    needed += stats.output_size_in_bytes - stats.alias_size_in_bytes
  # what is kept may be fused away or made again
  parts["activations"] = min(parts["activations"], needed - sum(parts[name] for name in inputs))
  memory = Memory(
    pod.usable, needed, temporaries=max(needed - sum(parts.values()), 0.0), compiled=compiled is not None, **parts
  )
  leaves = jax.tree_util.tree_leaves_with_path
  # optax numbers the parts of its chains
  name = lambda part, path: f"{part} {re.sub(r'^([0-9]+[.])+', '', path_name(path))}"
  named = [(name(part, path), shard_bytes(x)) for part, tree in inputs.items() for path, x in leaves(tree)]
  whole = Plan(
    config=spec,
    arm=arm,
    what=what,
    topology=pod.name,
    chips=pod.chips,
    devices=pod.devices,
    mesh=dict(mesh.shape),
    tokens=tokens,
    model_flops=model_flops,
    memory=memory,
    largest=sorted(named + kept, key=lambda entry: -entry[1])[:8],
    fixes=[],
    compile_seconds=seconds,
  )
  if not memory.fits:
    return dataclasses.replace(whole, fixes=suggest(whole, cfg, pod) if fixes and what == "train" else [])
  chip = pod.chip
  counts = program.count(
    compiled.as_text(),
    dict(mesh.shape),
    chip.flops / pod.devices_per_chip,
    chip.bandwidth / pod.devices_per_chip,
    kernel_flops=kernel_flops,
  )
  registers = ptx.registers(list(counts.kernels)) if pod.generation in topology.GPUS else {}
  # axes may use links of their own at the same time: the busiest bounds the step
  busy: dict[tuple[str, ...], float] = {}
  for c in counts.collectives:
    if c.axes:
      busy[c.axes] = busy.get(c.axes, 0.0) + c.sent / topology.axis_bandwidth(mesh, pod, c.axes)
  links = max(busy.values(), default=0.0)
  return dataclasses.replace(
    whole, counts=counts, link_seconds=links, step_seconds=max(counts.compute_seconds, links), registers=registers
  )


def kernel_flops(name: str, operands: list[hlo.Array]) -> float | None:
  """What a custom call that the compiler knows nothing of computes; None for a kernel that is not ours."""
  shapes = [array.dims for array in operands]
  known = splash.flops(name, shapes)
  return pallas_gpu.flops(name, shapes, operands[0].bits) if known is None else known


def check_batch(cfg: config.RunConfig, pod: Topology) -> None:
  """Raises UserError where the rows of a step do not cover the devices, or the mesh does not divide them."""
  sizes = topology.axis_sizes(cfg.mesh, pod.devices)
  shards = math.prod(sizes[axis] for axis in BATCH)
  parts = shards * cfg.accumulate
  fix = f"does not divide by mesh.replica x mesh.data x accumulate = {parts} on {pod.name}"
  fix += "; use a multiple, a larger mesh.model or a smaller slice"
  check(cfg.batch % (shards * cfg.accumulate) == 0, "batch", cfg.batch, fix)


def compile_for(lowered) -> tuple[Any, float]:
  """(the compiled program, 0), or (None, bytes of HBM that a device would need). Raises UserError."""
  try:
    return lowered.compile(), 0.0
  except jax.errors.JaxRuntimeError as e:
    told = " ".join(str(e).split())
    # other memories run out too: a kernel's VMEM is no question of the pod's size
    needed = re.search(r"(?:HBM|hbm).*?\(?([\d.]+)([KMGT])\)? (?:exceeds|of)", told)
    if "RESOURCE_EXHAUSTED" not in told or not needed:
      raise UserError("compile", told[:300], "the compiler refuses this program") from e
    # libtpu says "temporaries", and counts arguments and results among them
    return None, float(needed[1]) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[needed[2]]


def lower_decode(exp: Experiment, cfg: config.RunConfig, state: TrainState):
  """(one token more for each of `cfg.batch` rows whose caches hold `cfg.length` tokens, lowered; the cache)."""
  mesh = jax.sharding.get_mesh()
  model = state.model
  check(
    hasattr(model, "extend"), "what", "decode", f"the model of experiment {cfg.experiment} does not generate tokens"
  )
  rows = jax.NamedSharding(mesh, jax.P(BATCH, None))
  tokens = lambda n: jax.ShapeDtypeStruct((cfg.batch, n), jnp.int32, sharding=rows)
  fill = lambda model, x: model.prefill(x, x, x, cfg.length)[1]
  cache = on_devices(jax.eval_shape(fill, model, tokens(cfg.length)))

  def step(model, token, segment_ids, positions, cache):
    x, cache = model.extend(token, segment_ids, positions, cache)
    return jnp.argmax(model.unembed(x), axis=-1), cache

  return jax.jit(step, donate_argnums=4).lower(model, tokens(1), tokens(1), tokens(1), cache), cache


def residuals(exp: Experiment, cfg: config.RunConfig, state: TrainState, batch: Any) -> list[tuple[str, float]]:
  """(name, bytes on one device) of all that the forward pass of a micro-batch keeps for the backward pass."""
  one = lambda x: jax.ShapeDtypeStruct((x.shape[0] // cfg.accumulate, *x.shape[1:]), x.dtype, sharding=x.sharding)

  def keep(model, batch, *reference):
    return jax.vjp(lambda model: exp.loss(model, batch, jax.random.key(0), *reference)["loss"].total, model)[1]

  reference = if_any(abstract_reference(exp, state))
  jaxpr = jax.make_jaxpr(keep)(state.model, jax.tree.map(one, batch), *reference).jaxpr
  given = set(jaxpr.invars) | set(jaxpr.constvars)
  kept = []
  for var in dict.fromkeys(v for v in jaxpr.outvars if isinstance(v, Var) and v not in given):
    size = shard_bytes(var.aval)
    if size > 0:
      kept.append((f"activations {_origin(jaxpr, var)} {var.aval.str_short(short_dtypes=True)}", size))
  return kept


def _origin(jaxpr, var) -> str:
  """The operations that made a value, outermost first."""
  for eqn in jaxpr.eqns:
    if var in eqn.outvars:
      inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
      inner = getattr(inner, "jaxpr", inner)
      at = eqn.outvars.index(var)
      if eqn.primitive.name in ("scan", "jit", "pjit", "closed_call") and at < len(inner.outvars):
        return f"{eqn.primitive.name}/{_origin(inner, inner.outvars[at])}"
      return eqn.primitive.name
  return "input"


def shard_bytes(x: Any) -> float:
  """Bytes of an abstract array on one device."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return 8.0
  sharding = getattr(x, "sharding", None)
  spec = getattr(sharding, "spec", None)
  shape = list(x.shape)
  sizes = dict(sharding.mesh.shape) if spec is not None else {}
  for i, entry in enumerate(spec or ()):
    axes = (entry,) if isinstance(entry, str) else entry or ()
    shape[i] = -(-shape[i] // math.prod(sizes[a] for a in axes if a in sizes))
  return float(math.prod(shape) * x.dtype.itemsize)


def suggest(whole: Plan, cfg: config.RunConfig, pod: Topology) -> list[tuple[str, bool, float]]:
  """Changes that save memory, cheapest first, each compiled, up to the first that fits.

  Single changes in the order of what they cost a step: sharing the parameters among
  replicas, smaller micro-batches, recomputation, tensor parallelism; bfloat16 moments
  stand after them because they change the numbers. Then all of them together. What
  could not help by arithmetic is not tried.
  """
  fields = config.flat(cfg)
  sizes = topology.axis_sizes(cfg.mesh, pod.devices)
  rows = cfg.batch // (sizes["replica"] * sizes["data"])
  candidates = []
  if cfg.mesh.partition == "replicated":
    candidates.append(["mesh.partition=fsdp"])
  if sizes["replica"] > 1:
    candidates.append(["mesh.replica=1", "mesh.data=-1"])
  m = whole.memory
  enough = lambda n: m.parameters + m.optimizer + m.activations * cfg.accumulate / n < m.limit
  micro = [n for n in _doublings(2 * cfg.accumulate, rows) if rows % n == 0]
  candidates += [[f"accumulate={n}"] for n in micro if enough(n)]
  stronger = {"none": ("dots", "full"), "dots": ("full",), "full": ()}
  candidates += [[f"model.remat={kind}"] for kind in stronger[fields.get("model.remat", "full")]]
  if cfg.mesh.partition == "fsdp_tp":
    heads = fields.get("model.kv_heads", fields.get("model.heads", 1))
    candidates += [[f"mesh.model={n}"] for n in _doublings(2 * sizes["model"], min(heads, 16))]
  candidates.append(["tx.moments=bfloat16"])
  least = [f"accumulate={rows}"] * (rows > 1) + ["model.remat=full"] * ("model.remat" in fields)
  candidates += [least, [*least, "tx.moments=bfloat16"]] if least else []
  tried = []
  for overrides in candidates:
    try:
      single = config.changed(cfg, overrides)
      found = plan(whole.config, whole.arm, single, pod, fixes=False)
    except UserError:
      continue  # a size that does not divide
    tried.append((" ".join(f"--config.{o}" for o in overrides), found.memory.fits, found.memory.needed))
    if found.memory.fits:
      break
  return tried


def _doublings(start: int, end: int) -> list[int]:
  return [start * 2**i for i in range(12) if start * 2**i <= end]


def find(spec: str, arm: str, cfg: config.RunConfig, generation: str, what: str) -> Plan:
  """The plan for the smallest standard slice of `generation` that the config fits. Raises UserError without one."""
  check(generation in topology.SIZES, "find", generation, f"choose from {', '.join(topology.SIZES)}")
  reasons = []
  for size in topology.SIZES[generation]:
    pod = topology.parse(f"{generation}:{size}")
    try:
      found = plan(spec, arm, cfg, pod, what, fixes=False)
    except UserError as e:
      if e.field == "topology" and "install" in e.fix:
        raise
      reasons.append(f"{size}: {e}")
      continue
    if found.memory.fits:
      return found
    reasons.append(f"{size}: needs {found.memory.needed / GIB:.1f} GiB a device")
  raise UserError("find", generation, f"no slice fits this config; {'; '.join(reasons[-3:])}")
