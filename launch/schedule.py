"""The schedule of a TPU kernel, read from the compiler's dump: bundles, slots, spills.

A TPU core issues one bundle of instructions a cycle. The compiler decides all of it, so the
bundles of the loop over a kernel's grid, times its iterations, are a lower bound on its time:
waiting for memory and for the matrix units' latency comes on top. It is the same every
time it is compiled, so two kernels compare exactly.

The format is undocumented: whatever is not as expected raises Unreadable.
"""

import dataclasses
import itertools
import pathlib
import re

FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final.*"


class Unreadable(Exception):
  """The dump is not in the format this was written for."""


@dataclasses.dataclass(frozen=True)
class Schedule:
  """One kernel."""

  bundles: int  # of the whole program
  steady: int  # of the loop over the grid, once, less what only first and last steps do
  iterations: int  # of that loop
  slots: dict[str, float]  # {unit: share of its slots in use} over the steady bundles
  fills: int  # loads of spilled registers in the steady bundles
  spills: int  # stores of them

  @property
  def cycles(self) -> int:
    """No fewer than these."""
    return self.steady * self.iterations


@dataclasses.dataclass(frozen=True)
class _Loop:
  begin: int
  end: int  # of the branch back
  trips: int | None


def read(folder: pathlib.Path, name: str) -> Schedule:
  """The schedule of the program `name` dumped in `folder`. Raises Unreadable."""
  files = {}
  for what in ("final_bundles", "final_hlo-static-per-bundle-utilization"):
    found = sorted(p for p in folder.iterdir() if re.match(rf"\d+-{re.escape(name)}-\d+-{what}\.txt$", p.name))
    if not found:
      raise Unreadable(f"no {what} of {name} in the dump")
    files[what] = found[-1].read_text()
  return parse(*files.values())


def parse(bundles: str, utilization: str) -> Schedule:
  """From the text of the two files. Raises Unreadable."""
  lines = bundles.split("\n")
  starts = [i for i, line in enumerate(lines) if re.match(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:[\s>]*\{", line)]
  texts = ["\n".join(lines[a:b]) for a, b in itertools.pairwise([*starts, len(lines)])]
  names, capacity, used = _slots(utilization)
  if not texts or len(texts) != len(used):
    raise Unreadable(f"{len(texts)} bundles, and slots of {len(used)}")
  begins = {}
  for i, text in enumerate(texts):
    for region in re.findall(r"Start(?:/End empty)? region (\d+)", text):
      begins.setdefault(int(region), i)
  loops, skips = [], []
  for i, text in enumerate(texts):
    branch = re.search(r"sbr\.rel \(!?%(\w+)\) target = \$region(\d+)", text)
    if not branch or int(branch[2]) not in begins:
      continue
    target = begins[int(branch[2])]
    if target > i:
      skips.append((i + 1, target))
    else:
      loops.append(_Loop(target, i, _trips(texts[target : i + 1], branch[1])))
  if not loops:
    raise Unreadable("no loop over the grid")
  grid = max(loops, key=lambda loop: loop.end - loop.begin)
  if grid.trips is None:
    raise Unreadable("the loop over the grid has no fixed length")
  mxu = names.index("MXU")
  # A region that may be skipped, and neither computes products nor moves blocks, is for first and last steps.
  rare = set()
  for begin, end in skips:
    works = any(used[i][mxu] for i in range(begin, end)) or any(re.search(r"\bdma[.\w]*", t) for t in texts[begin:end])
    if not works:
      rare |= set(range(begin, end))
  weights = {i: 1 for i in range(grid.begin, grid.end + 1) if i not in rare}
  for loop in loops:
    if loop is not grid and grid.begin <= loop.begin and loop.end <= grid.end:
      if loop.trips is None:
        raise Unreadable("a loop inside the grid has no fixed length")
      for i in range(loop.begin, loop.end + 1):
        if i in weights:
          weights[i] *= loop.trips
  steady = sum(weights.values())
  totals = [sum(n * used[i][column] for i, n in weights.items()) for column in range(len(names))]
  slots = {name: totals[i] / (capacity[i] * steady) for i, name in enumerate(names)}
  at = dict(zip(names, totals, strict=True))
  return Schedule(len(texts), steady, grid.trips, slots, at["VLOAD:FILL"], at["VSTORE:SPILL"])


def _slots(text: str) -> tuple[list[str], list[int], list[list[int]]]:
  head = re.match(r"== CAPAC\w+:\n(.*)\n([\d ]+)\n== UTILIZATION:\n", text)
  if not head:
    raise Unreadable("slots have another header")
  names = [name.strip() for name in head[1].split(",")]
  rows = [[int(n) for n in line.split()] for line in text[head.end() :].split("\n") if line.strip()]
  capacity = [int(n) for n in head[2].split()]
  if not {"MXU", "VALU", "VLOAD:FILL", "VSTORE:SPILL"} <= set(names) or any(len(r) != len(names) for r in rows):
    raise Unreadable(f"slots are of {names}")
  return names, capacity, rows


def _trips(texts: list[str], predicate: str) -> int | None:
  """The constant that the loop's exit test compares its counter with."""
  for text in reversed(texts):
    test = re.search(rf"%{predicate} = scmp\.\w+\.s32\.totalorder %\w+, (\d+)", text)
    if test:
      return int(test[1])
  return None
