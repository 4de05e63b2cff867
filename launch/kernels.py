"""The schedule of each Pallas TPU kernel, as the compiler lays it out: `python -m launch.kernels`.

Every op under research/kernels whose cases.py has `programs` is compiled for each TPU
generation, and what its kernels and their peers cost is read from the compiler's dump.
Times are static: bundles of the loop over the grid times its iterations over the clock.
Waiting is not in them. Baselines stand beside each op in `schedules.json`, by version of
libtpu; `--write` renews them.

Exit status: 0; 1 if a kernel has become more than 3 % slower than its baseline; 2 a mistake in the command.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import pathlib
import re
import sys
import tempfile
from typing import Any

import jax

from launch import hlo, schedule, topology
from research import run
from research.errors import UserError, check
from research.hardware import CHIPS
from research.kernels.program import Program
from research.report import table

ROOT = pathlib.Path(__file__).parents[1]
# The smallest slice of each generation: one of its chips is compiled for.
GENERATIONS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
TOLERANCE = 1.03


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One kernel of a program, compiled for one generation."""

  name: str
  schedule: schedule.Schedule
  share: float  # of its steps that compute
  vmem: int  # bytes
  moved: float  # bytes of its operands and results: what it reads and writes of HBM at least

  @property
  def cycles(self) -> float:
    return self.schedule.cycles * self.share


def main() -> int:
  parser = run.Parser(prog="python -m launch.kernels", description="The schedule of each Pallas TPU kernel.")
  parser.add_argument("--op", help="one op under research/kernels; default: all")
  parser.add_argument("--case", help="one case of its cases.py; default: all")
  parser.add_argument("--generation", help=f"one of {', '.join(GENERATIONS)}; default: all")
  parser.add_argument("--write", action="store_true", help="make what is found the baseline")
  parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
  args = parser.parse_args()
  ops = {name: module for name, module in with_kernels().items() if args.op in (None, name)}
  check(bool(ops), "op", args.op, f"no such op with a TPU kernel; choose from {', '.join(with_kernels())}")
  generations = [g for g in GENERATIONS if args.generation in (None, g)]
  check(bool(generations), "generation", args.generation, f"choose from {', '.join(GENERATIONS)}")
  found, slower = [], []
  with Compiler() as compiler:
    for op, module in ops.items():
      cases = {name: case for name, case in module.CASES.items() if args.case in (None, name)}
      check(bool(cases), "case", args.case, f"choose from {', '.join(module.CASES)}")
      known = baselines(op)
      for case in cases:
        for generation in generations:
          kernels = compiler.kernels(module.programs(cases[case]), generation)
          before = known.get(generation, {}).get(case, {})
          rows = [row(op, case, generation, program, kernel, before) for program, kernel in kernels]
          found += rows
          slower += [r for r in rows if r["change"] is not None and r["change"] > TOLERANCE]
          told = {(program, kernel.name) for program, kernel in kernels}
          kept = {(program, name) for program, names in before.items() for name in names}
          for program, name in sorted(kept ^ told if before else ()):
            print(
              f"{op} {case} {generation}: {program} {name} is in the baseline or the program, not in both",
              file=sys.stderr,
            )
          known.setdefault(generation, {})[case] = baseline(kernels)
          if not args.json:
            told = [cells(r) for r in rows]
            print(f"{op} {case} on {generation}\n{table(HEADER, told)}\n", flush=True)
      if args.write:
        write(op, known)
  if args.json:
    print(json.dumps(found, indent=1))
  for r in slower:
    print(
      f"slower: {r['op']} {r['case']} {r['generation']} {r['kernel']}: {r['change']:.3f} of its baseline",
      file=sys.stderr,
    )
  return 1 if slower and not args.write else 0


def with_kernels() -> dict[str, Any]:
  """{op: its cases module} of the ops that have TPU kernels."""
  modules = {}
  for path in sorted(ROOT.glob("research/kernels/*/cases.py")):
    module = importlib.import_module(f"research.kernels.{path.parent.name}.cases")
    if hasattr(module, "programs"):
      modules[path.parent.name] = module
  return modules


class Compiler:
  """libtpu with its dump in a folder of its own. Made before anything starts jax's backend; one a process."""

  def __init__(self):
    lacking = topology.missing(topology.parse("v5e:2x2"))
    check(lacking is None, "libtpu", "not installed", lacking)

  def __enter__(self):
    self._folder = tempfile.TemporaryDirectory()
    self.folder = pathlib.Path(self._folder.name)
    topology.environment(schedule.FLAGS.format(folder=self.folder))
    return self

  def __exit__(self, *exc):
    self._folder.cleanup()

  def kernels(self, programs: dict[str, Program], generation: str) -> list[tuple[str, Kernel]]:
    """(program's name, kernel) of every kernel in the programs. Raises UserError if the dump cannot be read."""
    device = topology.devices(topology.parse(GENERATIONS[generation]))[0]
    on = jax.sharding.SingleDeviceSharding(device)
    found = []
    for name, program in programs.items():
      for file in self.folder.iterdir():
        file.unlink()
      operands = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), program.operands)
      text = jax.jit(program.call).lower(*operands).compile().as_text()
      computations, _ = hlo.parse(text)
      for computation in computations.values():
        for instruction in computation.instructions.values():
          if instruction.attribute("custom_call_target") == '"tpu_custom_call"':
            found.append((name, self._kernel(computation, instruction, program.share)))
    return found

  def _kernel(self, within: hlo.Computation, instruction: hlo.Instruction, share: float) -> Kernel:
    try:
      found = schedule.read(self.folder, instruction.name)
    except schedule.Unreadable as e:
      fix = f"its dump is not understood ({e}); this was written for libtpu 0.0.42 and 0.0.50"
      raise UserError("libtpu", version(), fix) from e
    arrays = [a for o in instruction.operands for a in within.instructions[o].types] + list(instruction.types)
    vmem = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1",.*?"size":"(\d+)"', instruction.attributes)
    name = re.sub(r"\.\d+$", "", instruction.name)
    return Kernel(name, found, share, int(vmem[1]) if vmem else 0, sum(a.bytes for a in arrays))


def version() -> str:
  """Of the installed libtpu."""
  return importlib.metadata.version("libtpu")


def baselines(op: str) -> dict[str, Any]:
  """{generation: {case: {program: {kernel: {"cycles": ...}}}}} of this libtpu; empty if none was written."""
  path = ROOT / "research/kernels" / op / "schedules.json"
  return json.loads(path.read_text()).get(version(), {}) if path.exists() else {}


def baseline(kernels: list[tuple[str, Kernel]]) -> dict[str, Any]:
  """What is kept of them."""
  kept: dict[str, Any] = {}
  for program, kernel in kernels:
    s = kernel.schedule
    kept.setdefault(program, {})[kernel.name] = {
      "cycles": round(kernel.cycles),
      "steady": s.steady,
      "fills": s.fills,
      "spills": s.spills,
      "vmem": kernel.vmem,
    }
  return kept


def write(op: str, known: dict[str, Any]) -> None:
  """Makes `known` the baselines of this libtpu."""
  path = ROOT / "research/kernels" / op / "schedules.json"
  every = json.loads(path.read_text()) if path.exists() else {}
  every[version()] = known
  path.write_text(json.dumps(dict(sorted(every.items())), indent=1) + "\n")


def row(op: str, case: str, generation: str, program: str, kernel: Kernel, before: dict[str, Any]) -> dict[str, Any]:
  """All that is told of a kernel."""
  chip, s = CHIPS[generation], kernel.schedule
  cores = 2 if generation in ("v4", "tpu7x") else 1  # a device there is a core
  static = kernel.cycles / chip.clock
  floor = kernel.moved / (chip.bandwidth / cores)
  known = before.get(program, {}).get(kernel.name)
  return {
    "op": op,
    "case": case,
    "generation": generation,
    "program": program,
    "kernel": kernel.name,
    "bundles": s.bundles,
    "steady": s.steady,
    "iterations": s.iterations,
    "share": kernel.share,
    "static_seconds": static,
    "hbm_floor_seconds": floor,
    "hbm_floor_fraction": floor / static,
    "slots": s.slots,
    "fills": s.fills,
    "spills": s.spills,
    "vmem": kernel.vmem,
    "change": kernel.cycles / known["cycles"] if known else None,
  }


HEADER = [
  "program",
  "kernel",
  "bundles",
  "steps",
  "us",
  "HBM floor",
  "MXU",
  "VALU",
  "load",
  "store",
  "fill, spill",
  "MiB VMEM",
  "to baseline",
]


def cells(r: dict[str, Any]) -> list[str]:
  """A row for people."""
  percent = lambda unit: f"{100 * r['slots'][unit]:.0f} %"
  change = "" if r["change"] is None else f"{r['change']:.3f}"
  return [
    r["program"],
    r["kernel"],
    f"{r['steady']:,}",
    f"{r['iterations'] * r['share']:,.0f}",
    f"{1e6 * r['static_seconds']:,.0f}",
    f"{100 * r['hbm_floor_fraction']:.0f} %",
    *(percent(unit) for unit in ("MXU", "VALU", "VLOAD", "VSTORE")),
    f"{r['fills']}, {r['spills']}",
    f"{r['vmem'] / 2**20:.1f}",
    change,
  ]


if __name__ == "__main__":
  run.guard(lambda: sys.exit(main()))
