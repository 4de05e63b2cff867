"""XLA's text of a compiled program, as instructions and arrays."""

from collections.abc import Iterator
import dataclasses
import json
import math
import re

import numpy as np

# Bits of an element; all others name their own (f32, bf16, u8, ...).
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a type: element bits, dimensions, layout (minor to major), tiles, and where it lives (0: HBM)."""

  bits: int
  dims: tuple[int, ...]
  minor_to_major: tuple[int, ...]
  tile: tuple[int, ...]
  space: int

  @property
  def bytes(self) -> float:
    """Without padding."""
    return math.prod(self.dims) * self.bits / 8

  @property
  def padded(self) -> float:
    """As it lies in memory: a TPU rounds the minor dimensions up to whole tiles."""
    dims = [self.dims[i] for i in self.minor_to_major]
    for i, tile in enumerate(reversed(self.tile)):
      if i < len(dims):
        dims[i] = -(-dims[i] // tile) * tile
    return math.prod(dims) * self.bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """`name = types opcode(operands), attributes`."""

  name: str
  opcode: str
  types: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str
  root: bool

  def attribute(self, name: str) -> str | None:
    """The computation or number that an attribute names."""
    found = re.search(rf"\b{name}=%?([^\s,{{}}]+)", self.attributes)
    return found and found[1]


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in the order they are scheduled."""

  name: str
  instructions: dict[str, Instruction]

  @property
  def root(self) -> Instruction:
    return next(i for i in self.instructions.values() if i.root)

  def users(self, name: str) -> list[Instruction]:
    """The instructions that read `name`."""
    return [i for i in self.instructions.values() if name in i.operands]


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """({name: computation}, name of the entry) of an HLO module's text."""
  computations, entry, name = {}, "", ""
  for line in _lines(text):
    head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
    if head and not line.startswith(" "):
      name = head[2]
      computations[name] = Computation(name, {})
      entry = name if head[1] else entry
    elif line.startswith("  ") and name:
      instruction = _instruction(line)
      if instruction:
        computations[name].instructions[instruction.name] = instruction
  return computations, entry


def _lines(text: str) -> Iterator[str]:
  """Whole instructions: an attribute may hold line breaks."""
  held = ""
  for line in text.split("\n"):
    if re.match(r"  (ROOT )?%[\w.\-]+ = |\}(?!\})|%|ENTRY |\w", line):
      if held:
        yield held
      held = line
    else:
      held += " " + line
  yield held


def _instruction(line: str) -> Instruction | None:
  found = re.match(r"  (ROOT )?%?([\w.\-]+) = ", line)
  if not found:
    return None
  rest = re.sub(r"/\*.*?\*/", "", line[found.end() :])
  end = _closing(rest) if rest.startswith("(") else rest.index(" ") - 1
  types, rest = rest[: end + 1], rest[end + 2 :]
  opcode, _, rest = rest.partition("(")
  end = _closing("(" + rest)
  operands = tuple(re.findall(r"%([\w.\-]+)", rest[: end - 1]))
  # a constant's operand is its value, a parameter's its number
  attributes = rest[end - 1 :] if opcode not in ("constant", "parameter") else rest
  return Instruction(found[2], opcode, tuple(_arrays(types)), operands, attributes, bool(found[1]))


def _closing(text: str) -> int:
  """Where the parenthesis that `text` starts with is closed."""
  depth = 0
  for i, c in enumerate(text):
    depth += (c == "(") - (c == ")")
    if depth == 0:
      return i
  raise ValueError(f"unbalanced: {text[:80]}")


def _arrays(types: str) -> Iterator[Array]:
  for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?", types):
    order, _, rest = layout.partition(":")
    tile = re.search(r"T\(([\d,]+)\)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    shape = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
    default = tuple(range(len(shape)))[::-1]
    bits = _BITS[dtype] if dtype in _BITS else int(re.search(r"\d+", dtype)[0])
    yield Array(
      bits,
      shape,
      tuple(int(i) for i in order.split(",") if i) or default,
      tuple(int(i) for i in tile[1].split(",")) if tile else (),
      int(space[1]) if space else 0,
    )


def replica_groups(attributes: str, total: int) -> list[tuple[int, ...]]:
  """The groups of a collective over `total` devices, in any of XLA's three notations."""
  listed = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
  if listed:
    return [tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", listed[1])]
  iota = re.search(r"replica_groups=(\[[^\s]*\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
  if iota:
    return [tuple(row) for row in _iota(iota[1]).tolist()]
  mesh = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\))\))?\s*\{(.*?)\}", attributes)
  if mesh:
    # device_ids=([64,4]T(1,0)): numbered row by row, then transposed
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    order = re.search(r"device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\)", attributes)
    ids = _iota(f"[{total}]<={order[1]}") if order else np.arange(total)
    ids = ids.reshape(tuple(sizes.values()))
    names = list(sizes)
    # an axis, or a part of one: 'axis_0':(4)8 is 8 of it, beyond the first 4
    parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh[3])
    shape, along = [], []
    for name in names:
      cut = [(int(pre), int(size)) for n, pre, size in parts if n == name and pre]
      if cut:
        pre, size = cut[0]
        shape += [pre, size, sizes[name] // (pre * size)]
        along.append(len(shape) - 2)
      else:
        shape.append(sizes[name])
        if any(n == name for n, _, _ in parts):
          along.append(len(shape) - 1)
    ids = np.moveaxis(ids.reshape(shape), along, range(-len(along), 0))
    members = math.prod(shape[i] for i in along)
    return [tuple(row) for row in ids.reshape(-1, members).tolist()]
  return [tuple(range(total))]


def _iota(text: str) -> np.ndarray:
  """`[4,64]<=[64,4]T(1,0)`: the numbers 0, 1, ... in shape [64,4], transposed, reshaped."""
  to, _, rest = text.partition("<=")
  dims, _, order = rest.partition("T")
  ids = np.arange(math.prod(json.loads(dims))).reshape(json.loads(dims))
  if order:
    ids = ids.transpose(json.loads(order.replace("(", "[").replace(")", "]")))
  return ids.reshape(json.loads(to))
