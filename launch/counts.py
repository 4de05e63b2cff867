"""What a compiled program does in one run, counted from XLA's own text: FLOPs, bytes of memory, collectives.

XLA's `cost_analysis` counts the body of a loop once. Here every instruction counts as often as
it runs: trip counts come from the loops' conditions. Fused computations are looked into, so
that a fusion that reads one slice of a stack of layers is charged for the slice.
"""

from collections.abc import Callable
import dataclasses
import math
import re

import numpy as np

from launch.hlo import Array, Computation, Instruction, parse, replica_groups

# Move nothing: names for what is elsewhere. Loops and calls are charged by their bodies.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"while", "call", "conditional", "opt-barrier", "copy-done", "slice-done", "async-update", "async-done"}

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
COLLECTIVES += ("collective-broadcast", "send")


@dataclasses.dataclass(frozen=True)
class Collective:
  """A kind of collective between the devices along some axes of the mesh, over one run of the program."""

  kind: str
  axes: tuple[str, ...]
  times: float  # how often it runs
  sent: float  # bytes that a device sends, all runs together


@dataclasses.dataclass
class Counts:
  """What one device does in one run."""

  flops: float = 0.0  # of matrix products and convolutions; two a multiply-add
  bytes: float = 0.0  # of HBM read and written
  compute_seconds: float = 0.0  # each instruction takes the longer of its FLOPs and its bytes
  cycles: float = 0.0  # the compiler's own estimate, where it has one: not of kernels, nor of waiting
  collectives: list[Collective] = dataclasses.field(default_factory=list)
  kernels: dict[str, float] = dataclasses.field(default_factory=dict)  # {name: how often it runs}
  uncounted: list[str] = dataclasses.field(default_factory=list)  # what could not be understood


def count(
  text: str,
  axes: dict[str, int],
  peak_flops: float = math.inf,
  bandwidth: float = math.inf,
  kernel_flops: Callable[[str, list[Array]], float | None] = lambda name, operands: None,
) -> Counts:
  """One run of the program `text` on one device of a mesh with `axes` {name: size}.

  peak_flops [1/s] and bandwidth [bytes/s] of a device make `compute_seconds`.
  kernel_flops(name, operands) knows what a custom call computes, or None.
  """
  computations, entry = parse(text)
  counts = Counts()
  seen: dict[tuple[str, tuple[str, ...]], list[float]] = {}

  def visit(name: str, times: float) -> None:
    channels = set()
    for instruction in computations[name].instructions.values():
      if instruction.opcode == "while":
        trips = _trips(computations, computations[name], instruction)
        if trips is None:
          counts.uncounted.append(f"loop {instruction.name}: its length is not known before it runs, counted once")
        visit(instruction.attribute("body"), times * (trips or 1))
      elif instruction.opcode in ("call", "call-start", "async-start"):
        visit(instruction.attribute("to_apply") or instruction.attribute("calls"), times)
      elif instruction.opcode == "conditional":
        branches = re.findall(r"%([\w.\-]+)", re.search(r"branch_computations=\{(.*?)\}", instruction.attributes)[1])
        counts.uncounted.append(f"conditional {instruction.name}: which branch it takes; all are counted")
        for branch in branches:
          visit(branch, times)
      else:
        charge(computations[name], instruction, times, channels)

  def charge(within: Computation, instruction: Instruction, times: float, channels: set) -> None:
    flops = _flops(computations, within, instruction)
    if instruction.opcode == "custom-call" and instruction.attribute("custom_call_target"):
      flops += custom(within, instruction, times)
    moved = _moved(computations, within, instruction)
    for kind, collective, inside in _collectives(computations, within, instruction):
      channel = collective.attribute("channel_id")
      # The steps of an asynchronous collective name it each, in fusions of their own.
      if channel is not None and channel in channels:
        continue
      channels.add(channel)
      operands = [a for o in collective.operands for a in inside.instructions[o].types]
      along, n = _axes(collective.attributes, axes)
      entry = seen.setdefault((kind, along), [0.0, 0.0])
      entry[0] += times
      entry[1] += times * _sent(kind, sum(a.bytes for a in operands), n)
    counts.flops += times * flops
    counts.bytes += times * moved
    counts.compute_seconds += times * max(flops / peak_flops, moved / bandwidth)
    estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    if estimate and int(estimate[1]) < 2**62:  # the largest integer stands for "unknown"
      counts.cycles += times * int(estimate[1])

  def custom(within: Computation, instruction: Instruction, times: float) -> float:
    target = instruction.attribute("custom_call_target").strip('"')
    if target not in ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2"):
      return 0.0  # the compiler's own: allocations, barriers, asynchronous copies
    triton = re.search(r'\bname = "([\w.]+)"', instruction.attributes)
    name = triton[1] if triton else re.sub(r"\.\d+$", "", instruction.name)
    counts.kernels[name] = counts.kernels.get(name, 0) + times
    told = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes)
    if told:
      return float(told[1])
    flops = kernel_flops(name, [a for o in instruction.operands for a in within.instructions[o].types])
    if flops is None:
      counts.uncounted.append(f"kernel {name}: its FLOPs are not known")
    return flops or 0.0

  visit(entry, 1.0)
  counts.uncounted = sorted(set(counts.uncounted))
  counts.collectives = [Collective(*key, *value) for key, value in sorted(seen.items())]
  return counts


def _trips(computations: dict[str, Computation], within: Computation, loop: Instruction) -> int | None:
  """How often a loop that counts up to a constant runs; None for any other."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if known:
    return int(known[1])
  condition, body = (computations[loop.attribute(name)] for name in ("condition", "body"))
  test, sides = _through_fusion(computations, condition, condition.root)
  if test.opcode != "compare" or len(sides) != 2:
    return None
  limits = [_constant(condition, name) for name in sides]
  counters = [_element(condition, name) for name in sides]
  side = next((i for i in (0, 1) if counters[i] is not None and limits[1 - i] is not None), None)
  if side is None:
    return None
  index, limit = counters[side], limits[1 - side]
  start = _constant(within, within.instructions[loop.operands[0]].operands[index])
  step, operands = _through_fusion(computations, body, body.instructions[body.root.operands[index]])
  steps = [_constant(body, name) for name in operands]
  direction = test.attribute("direction")
  if start is None or step.opcode != "add" or sum(s is not None for s in steps) != 1:
    return None
  step = next(s for s in steps if s is not None)
  if side == 1:
    direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
  span = limit - start if direction in ("LT", "LE", "NE") else start - limit
  span += direction in ("LE", "GE")
  return max(-(-span // abs(step)), 0)


def _through_fusion(computations, within: Computation, instruction: Instruction) -> tuple[Instruction, list[str]]:
  """(what a fusion of one operation does, the names outside that it does it to)."""
  if instruction.opcode in ("copy", "bitcast", "convert") and instruction.operands[0] in within.instructions:
    return _through_fusion(computations, within, within.instructions[instruction.operands[0]])
  if instruction.opcode != "fusion":
    return instruction, list(instruction.operands)
  fused = computations[instruction.attribute("calls")]
  names = []
  for name in fused.root.operands:
    inner = _source(fused, name)
    if inner.opcode == "parameter":
      names.append(instruction.operands[_number(inner)])
    else:
      names.append(name)
      within.instructions.setdefault(name, inner)
  return fused.root, names


def _source(within: Computation, name: str) -> Instruction:
  instruction = within.instructions[name]
  while instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
    instruction = within.instructions[instruction.operands[0]]
  return instruction


def _constant(within: Computation, name: str) -> int | None:
  source = _source(within, name)
  value = re.match(r"-?\d+(?=\))", source.attributes) if source.opcode == "constant" else None
  return int(value[0]) if value else None


def _element(within: Computation, name: str) -> int | None:
  """Which element of the loop's state this is."""
  source = _source(within, name)
  return int(source.attribute("index")) if source.opcode == "get-tuple-element" else None


def _flops(computations, within: Computation, instruction: Instruction) -> float:
  shape = lambda i: within.instructions[instruction.operands[i]].types[0].dims
  if instruction.opcode == "fusion":
    fused = computations[instruction.attribute("calls")]
    return sum(_flops(computations, fused, inner) for inner in fused.instructions.values())
  if instruction.opcode == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
    depth = math.prod(shape(0)[int(d)] for d in contracted.split(",") if d)
    return 2.0 * math.prod(instruction.types[0].dims) * depth
  if instruction.opcode == "convolution":
    return _convolution_flops(instruction, shape(0), shape(1))
  if instruction.opcode == "custom-call" and "__cublas" in instruction.attributes:
    contracted = re.search(r'"lhs_contracting_dimensions":\["?(\d+)', instruction.attributes)
    depth = shape(0)[int(contracted[1])] if contracted else 0
    return 2.0 * math.prod(instruction.types[0].dims) * depth
  return 0.0


def _convolution_flops(instruction: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
  """Two for every pair of elements that are multiplied; padding and holes are not.

  TPUs write matrix products as convolutions, batches as windows that meet one element each.
  """
  lhs_labels, rhs_labels, out_labels = re.split(r"_|->", instruction.attribute("dim_labels"))
  out = instruction.types[0].dims
  window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
  fields = dict(f.split("=") for f in window[1].split()) if window else {}
  spatial = [label for label in out_labels if label.isdigit()]
  pairs = 1
  for label in spatial:
    i = int(label)
    field = lambda name, default, i=i: fields.get(name, "x".join([default] * len(spatial))).split("x")[i]
    size, stride = rhs[rhs_labels.index(label)], int(field("stride", "1"))
    low = int(field("pad", "0_0").split("_")[0])
    lhs_dilate, rhs_dilate = int(field("lhs_dilate", "1")), int(field("rhs_dilate", "1"))
    at = np.arange(out[out_labels.index(label)])[:, None] * stride + np.arange(size)[None] * rhs_dilate - low
    inside = (at >= 0) & (at % lhs_dilate == 0) & (at // lhs_dilate < lhs[lhs_labels.index(label)])
    pairs *= int(inside.sum())
  channels = rhs[rhs_labels.index("i")]  # of one group
  others = math.prod(n for n, label in zip(out, out_labels, strict=True) if not label.isdigit())
  groups = int(instruction.attribute("batch_group_count") or 1)
  return 2.0 * others * pairs * channels / groups


def _moved(computations, within: Computation, instruction: Instruction) -> float:
  """Bytes of HBM that an instruction reads and writes."""
  hbm = lambda arrays: sum(a.padded for a in arrays if a.space == 0)
  operands = [within.instructions[o].types for o in instruction.operands]
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith("-done") or _is_marker(instruction):
    return 0.0
  if opcode in ("dynamic-slice", "slice", "gather"):
    # reads what it writes, wherever that is
    return sum(a.padded for a in instruction.types) * (hbm(operands[0]) > 0) + hbm(instruction.types)
  if opcode == "dynamic-update-slice":
    return 2 * sum(a.padded for a in operands[1]) if hbm(operands[0]) else hbm(operands[1])
  if opcode == "scatter":
    return 3 * sum(a.padded for a in operands[-1])
  if opcode == "copy-start":  # (target, source, context)
    return hbm(instruction.types[:2])
  if opcode == "slice-start":  # ((source), target, context)
    target = instruction.types[1]
    return target.padded * ((instruction.types[0].space == 0) + (target.space == 0))
  if opcode == "fusion":
    fused = computations[instruction.attribute("calls")]
    return _read_by_fusion(computations, fused) + _written_by_fusion(computations, fused, instruction)
  if opcode.removesuffix("-start") in COLLECTIVES and opcode.endswith("-start"):
    return 2 * sum(hbm(o) for o in operands)
  return sum(hbm(o) for o in operands) + hbm(instruction.types)


def _is_marker(instruction: Instruction) -> bool:
  """Starts, steps and ends of asynchronous collectives, and buffers: their arrays are moved by others."""
  return instruction.opcode == "custom-call" and bool(
    re.search(r'custom_call_target="(\w*Async\w*|AllocateBuffer|AssumeGather\w*|ConcatBitcast)', instruction.attributes)
  )


def _read_by_fusion(computations, fused: Computation) -> float:
  parameters = [i for i in fused.instructions.values() if i.opcode == "parameter" and i.types]
  return sum(_read(computations, fused, p) for p in parameters if all(a.space == 0 for a in p.types))


def _read(computations, fused: Computation, source: Instruction, nested: bool = False) -> float:
  """What of `source` its users in the fusion read: slices, if nothing else."""
  whole = sum(a.padded for a in source.types)
  total = whole if nested and source.root else 0.0  # all of it is handed to the fusion around
  for user in fused.users(source.name):
    first = user.operands[0] == source.name
    if user.opcode in ("dynamic-slice", "slice", "gather") and first:
      total += sum(a.padded for a in user.types)
    elif user.opcode == "dynamic-update-slice" and first:
      continue  # written in place
    elif user.opcode == "bitcast":
      total += _read(computations, fused, user, nested)
    elif user.opcode == "tuple" or _is_marker(user):
      continue  # passed on
    elif user.opcode == "fusion":
      inner = computations[user.attribute("calls")]
      at = {i for i, name in enumerate(user.operands) if name == source.name}
      total += sum(_read(computations, inner, p, True) for p in inner.instructions.values() if _number(p) in at)
    else:
      return whole
  return min(total, whole)


def _number(instruction: Instruction) -> int | None:
  """Which parameter of its computation this is."""
  return int(instruction.attributes.split(")")[0]) if instruction.opcode == "parameter" else None


def _written_by_fusion(computations, fused: Computation, fusion: Instruction) -> float:
  roots = [fused.root]
  if fused.root.opcode == "tuple":
    roots = [fused.instructions[name] for name in fused.root.operands]
  total = 0.0
  for root, to in zip(roots, fusion.types, strict=False):
    within = fused
    while root.opcode in ("bitcast", "fusion"):
      if root.opcode == "fusion":
        within = computations[root.attribute("calls")]
        root = within.root
      else:
        root = within.instructions[root.operands[0]]
    if root.opcode == "parameter" or root.opcode in COLLECTIVES or _is_marker(root) or to.space != 0:
      continue  # passed on, counted as a collective, or not in HBM
    if root.opcode == "dynamic-update-slice":
      total += sum(a.padded for a in within.instructions[root.operands[1]].types)
    else:
      total += to.padded
  return total


def _collectives(computations, within: Computation, instruction: Instruction):
  """(kind, collective, the computation it stands in) of an instruction and of what is fused into it."""
  kind = instruction.opcode.removesuffix("-start")
  if kind in COLLECTIVES and "is_host_transfer=true" not in instruction.attributes:
    # A TPU writes a reduce-scatter as a fusion of an all-reduce and a slice, and names it so.
    yield "reduce-scatter" if "all-reduce-scatter" in within.name else kind, instruction, within
  elif instruction.opcode == "fusion":
    fused = computations[instruction.attribute("calls")]
    for inner in fused.instructions.values():
      yield from _collectives(computations, fused, inner)


def _sent(kind: str, size: float, n: int) -> float:
  """Bytes that each of `n` devices sends, of `size` bytes that each starts with, by the best algorithms on a ring."""
  if kind == "all-gather":
    return size * (n - 1)
  if kind == "all-reduce":
    return 2 * size * (n - 1) / n
  if kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
    return size * (n - 1) / n
  return size


def _axes(attributes: str, axes: dict[str, int]) -> tuple[tuple[str, ...], int]:
  """(the mesh axes along which the members of a group differ, members of a group)."""
  shape = tuple(axes.values())
  total = math.prod(shape)
  pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
  if pairs:
    ids = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)", "{" + pairs[1])]
    groups = [pair for pair in ids if pair[0] != pair[1]] or ids[:1]
  else:
    groups = [next(iter(replica_groups(attributes, total)))]
  varying = set()
  for group in groups:
    at = np.stack(np.unravel_index(np.array(group) % total, shape))
    varying |= {name for name, row in zip(axes, at, strict=True) if len(set(row.tolist())) > 1}
  return tuple(name for name in axes if name in varying), len(groups[0])
