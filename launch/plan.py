"""Does a config fit a pod, and what would its step cost there? Asked of the real compiler, on this machine.

  python -m launch.plan --config=FILE.py:ARG --topology=v5p:8x8x8     one config on one pod
  python -m launch.plan --config=FILE.py:ARG --find=v5e               the smallest v5e slice that it fits
  python -m launch.plan --all                                         every config on a matrix of pods: docs/pods.md

Every time, FLOP/s and utilisation that it prints is a projection: the program's own counts
over the chip's published rates, which nothing runs faster than.
"""

import dataclasses
import json
import math
import pathlib
import re
import runpy
import sys
import time
from typing import Any

import jax
from jax import numpy as jnp
from jax.extend.core import Var

from launch import hlo, ptx, topology
from launch.topology import Topology
from research import config, run
from research.errors import UserError, check
from research.fit import (
  Experiment,
  TrainState,
  abstract_batch,
  abstract_reference,
  abstract_state,
  if_any,
  jit_step,
  on_devices,
)
from research.kernels.attention import splash
from research.kernels.lightning_attention import pallas_gpu
from research.mesh import BATCH
from research.report import table
from research.tools.params import path_name

ROOT = pathlib.Path(__file__).parents[1]
GIB = 2**30
HOST = ("v5e:2x2",)  # what --all plans a config for that names no other PODS


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
  counts: hlo.Counts | None = None  # of one device; None where it does not fit
  link_seconds: float = 0.0
  step_seconds: float = 0.0  # no less
  registers: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # of Triton kernels, see launch.ptx

  @property
  def mfu(self) -> float:
    """Model FLOPs over what all chips could do in `step_seconds`: no more."""
    return self.model_flops / (self.step_seconds * self.chips * topology.CHIPS[self.topology.split(":")[0]].flops)


def main() -> None:
  parser = run.Parser(prog="python -m launch.plan", description="Any field of the config can be set: --config.batch=64")
  parser.add_argument(
    "--config", metavar="FILE.py:ARG", help="a config file, e.g. experiments/kvshift/configs/paper.py:19b"
  )
  parser.add_argument("--topology", metavar="NAME", help="a pod slice or GPU nodes: v5p:8x8x8, h100:8, h100:4x8")
  parser.add_argument("--find", metavar="GENERATION", help=f"the smallest that fits, of {', '.join(topology.SIZES)}")
  parser.add_argument(
    "--all", action="store_true", help="every config of every experiment that docs/pods.md lacks or has otherwise"
  )
  parser.add_argument("--again", action="store_true", help="with --all: also those that it has")
  parser.add_argument(
    "--what", choices=("train", "decode"), default="train", help="a training step, or one token a row"
  )
  parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
  args, overrides = parser.parse_with_overrides(sys.argv[1:])
  ways = [name for name in ("topology", "find", "all") if getattr(args, name)]
  check(len(ways) == 1, "command line", " ".join(ways) or "(empty)", "give one of --topology, --find and --all")
  check(args.all or args.config, "config", "''", "name a config file: --config=FILE.py:ARG")
  given = args.config or " ".join(overrides)
  check(not (args.all and given), "config", given, "--all takes every config as it is")
  check(not (args.all and args.what != "train"), "what", args.what, "--all plans training steps")
  check(args.all or not args.again, "again", "", "goes with --all")
  topology.environment()
  if args.all:
    plan_all(args.again)
    return
  with ptx.dumped():  # where XLA's GPU compiler is asked
    plan_one(args, overrides)


def plan_one(args, overrides: list[str]) -> None:
  """Every arm of one config, on the named pod or the smallest that it fits."""
  cfg = config.load(args.config, overrides)
  found = []
  for arm, single in config.expand(dataclasses.replace(cfg, seeds=cfg.seeds[:1])):
    if args.find:
      found.append(find(args.config, arm, single, args.find, args.what))
    else:
      found.append(plan(args.config, arm, single, topology.parse(args.topology), args.what))
    if not args.json:
      print(describe(found[-1]), flush=True)
  if args.json:
    print(json.dumps([as_json(p) for p in found], indent=1))


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
  counts = hlo.count(
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
      single = config.freeze(type(cfg), config.override(config.as_configdict(cfg), type(cfg), overrides))
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


def describe(p: Plan) -> str:
  """For people."""
  m = p.memory
  mesh = " x ".join(f"{axis} {size}" for axis, size in p.mesh.items())
  step = "training step" if p.what == "train" else "decoding step"
  lines = [f"{p.config}, arm {p.arm}, {step} on {p.topology}: {p.devices} devices, mesh {mesh}"]
  verdict = "fits" if m.fits else "DOES NOT FIT"
  lines.append(
    f"{verdict}: {m.needed / GIB:.2f} of {m.limit / GIB:.2f} GiB a device; compiled in {p.compile_seconds:.0f} s"
  )
  names = ("parameters", "optimizer", "batch", "activations", "temporaries")
  if p.what == "decode":
    names = ("parameters", "batch", "temporaries")
  parts = [("caches" if p.what == "decode" and n == "batch" else n, f"{getattr(m, n) / GIB:.3f}") for n in names]
  lines += ["", table(["memory", "GiB a device"], parts)]
  if not m.fits:
    lines += ["", table(["largest buffers", "GiB a device"], [(n, f"{b / GIB:.3f}") for n, b in p.largest])]
    if p.fixes:
      rows = [(o, "fits" if ok else "no", f"{need / GIB:.2f}") for o, ok, need in p.fixes]
      lines += ["", table(["change, cheapest first", "", "GiB a device"], rows)]
    if not any(ok for _, ok, _ in p.fixes):
      tried = "no change that was tried makes it fit" if p.what == "train" else "use a smaller batch or length"
      lines += ["", f"{tried}; or ask for a larger slice: --find={p.topology.split(':')[0]}"]
    return "\n".join(lines) + "\n"
  c = p.counts
  rows = [
    (col.kind, " x ".join(col.axes) or "-", f"{col.times:,.0f}", f"{col.sent / 2**20:,.1f}") for col in c.collectives
  ]
  lines += ["", table(["collective", "along", "a step", "MiB sent a device"], rows)] if rows else ["", "no collectives"]
  rows = [
    ("FLOPs a device", f"{c.flops:.4g}"),
    ("HBM bytes a device", f"{c.bytes:.4g}"),
    ("computing and HBM, by instruction", f"{1e3 * c.compute_seconds:.2f} ms"),
    ("links, along the busiest axes", f"{1e3 * p.link_seconds:.2f} ms"),
    ("step, no less than", f"{1e3 * p.step_seconds:.2f} ms"),
    *([("model FLOPs utilisation, at most", f"{100 * p.mfu:.1f} %")] if p.model_flops else []),
    ("tokens a second, at most", f"{p.tokens / p.step_seconds:,.0f}"),
  ]
  pod = topology.parse(p.topology)
  if c.cycles and pod.chip.torus:
    rows.insert(4, ("the compiler's estimate without kernels and links", f"{1e3 * c.cycles / pod.chip.clock:.2f} ms"))
  lines += ["", table([f"projection for one {step}", ""], rows)]
  lines += [f"not counted: {what}" for what in c.uncounted]
  if p.registers:
    told = [(name, str(used), str(spilled)) for name, (used, spilled) in p.registers.items()]
    lines += ["", table(["Triton kernel", "registers a thread", "bytes spilled a thread"], told)]
  if pod.generation in topology.GPUS:
    if not c.kernels:
      lines.append("planned with XLA's attention: cuDNN's, which runs on the GPU, cannot be compiled without one")
    lines.append("jax takes 75 % of a GPU's memory unless told more: XLA_PYTHON_CLIENT_MEM_FRACTION=0.92")
  return "\n".join(lines) + "\n"


def as_json(p: Plan) -> dict[str, Any]:
  """For machines."""
  told = dataclasses.asdict(p) | {"fits": p.memory.fits, "projection": True}
  if p.memory.fits:
    del told["largest"], told["fixes"]
  if p.counts is not None:
    told |= {"mfu": p.mfu, "tokens_per_second": p.tokens / p.step_seconds}
  return told


def specs() -> list[tuple[str, config.RunConfig]]:
  """Every config file of every experiment with each of its ARGS; one of those that are the same run."""
  found = []
  for path in sorted(ROOT.glob("experiments/*/configs/[!_]*.py")):
    for arg in (*runpy.run_path(str(path)).get("ARGS", ()), ""):
      spec = f"{path.relative_to(ROOT)}:{arg}".removesuffix(":")
      cfg = config.load(str(ROOT / spec))
      if cfg not in [known for _, known in found]:
        found.append((spec, cfg))
  return found


def pods_of(spec: str) -> tuple[str, ...]:
  """The pods that a config is made for: its file's PODS, names or {argument: names}; or one host."""
  path, _, arg = spec.partition(":")
  pods = runpy.run_path(str(ROOT / path)).get("PODS", HOST)
  return pods.get(arg, HOST) if isinstance(pods, dict) else pods


def plan_all(again: bool) -> None:
  """Plans every config for its pods and keeps docs/pods.json and docs/pods.md: what they lack, or `again` all."""
  docs, found = ROOT / "docs", specs()
  wanted = {(spec, name): topology.parse(name) for spec, _ in found for name in pods_of(spec)}
  missing = {pod.name: topology.missing(pod) for pod in wanted.values() if topology.missing(pod)}
  for name, why in missing.items():
    print(f"left out: {name}: {why}", file=sys.stderr)
  some = len(missing) < len({name for _, name in wanted})
  check(some, "all", "", "nothing to compile with; pip install -e '.[aot]'")
  known = {(entry["config"], entry["topology"]): entry for entry in json.loads((docs / "pods.json").read_text())}

  def keep():
    entries = [known[key] for key in wanted if key in known]
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    (docs / "pods.json").write_text(f"[\n{lines}\n]\n")
    (docs / "pods.md").write_text(page(entries))

  for single, name, entry in lacking(found, {} if again else known):
    if name in missing:
      continue
    pod = wanted[entry["config"], name]
    try:
      entry |= as_json(plan(entry["config"], entry["arm"], single, pod))
    except UserError as e:
      entry |= {"refused": str(e)}
    known[entry["config"], name] = entry
    print(*row(entry), sep=" | ", flush=True)
    keep()  # all of it takes long
  keep()
  print(f"{docs / 'pods.md'} and {docs / 'pods.json'} have every config")


def lacking(
  found: list[tuple[str, config.RunConfig]], known: dict[tuple[str, str], dict[str, Any]]
) -> list[tuple[config.RunConfig, str, dict[str, Any]]]:
  """(a single run, a pod's name, how its entry begins) of all that `known` lacks or has of other settings.

  The run is the arm that the config's file names as its PLANNED, or else the last one, which is the paper's own.
  """
  out = []
  for spec, cfg in found:
    singles = dict(config.expand(dataclasses.replace(cfg, seeds=cfg.seeds[:1])))
    arm = runpy.run_path(str(ROOT / spec.partition(":")[0])).get("PLANNED", list(singles)[-1])
    single = singles[arm]
    begins = {"config": spec, "arm": arm, "settings": config.digest(config.flat(single))}
    for name in pods_of(spec):
      if not begins.items() <= known.get((spec, name), {}).items():
        out.append((single, name, begins | {"topology": name}))
  return out


def row(entry: dict[str, Any]) -> tuple[str, ...]:
  """An entry of pods.json as a row of its table."""
  name = entry["config"].split("experiments/")[-1].replace("/configs/", " ")
  head = (name, entry["arm"], entry["topology"])
  if "refused" in entry:
    return (*head, entry["refused"].split(f" on {entry['topology']};")[0], "", "", "", "")
  memory = entry["memory"]
  size = f"{memory['needed'] / GIB:.2f} of {memory['limit'] / GIB:.1f}"
  if not entry["fits"]:
    fix = next((overrides for overrides, fits, _ in entry["fixes"] if fits), "no change tried makes it fit")
    return (*head, f"does not fit: {fix}", size, "", "", "")
  ms, mfu = f"{1e3 * entry['step_seconds']:.2f}", f"{100 * entry['mfu']:.0f} %"
  return (*head, "fits", size, ms, mfu, f"{entry['tokens_per_second']:,.0f}")


def page(entries: list[dict[str, Any]]) -> str:
  """docs/pods.md."""
  header = ["config", "arm", "pod", "", "GiB a device", "step, ms", "MFU", "tokens/s"]
  return f"""# Which pod for which config

Written by `python -m launch.plan --all` with jax {jax.__version__}: each config's training step, compiled for each pod
by its real compiler. The last three columns are projections: no step is shorter, and nothing has run there. Where a
batch does not divide by the devices the config is refused, as it would be on the pod. The same and more: `pods.json`.

{table(header, [row(entry) for entry in entries])}
"""


if __name__ == "__main__":
  run.guard(main)
