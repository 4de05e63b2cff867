"""Does a config fit a pod, and what would its step cost there? Asked of the real compiler, on this machine.

  python -m launch.plan --config=FILE.py:ARG --topology=v5p:8x8x8     one config on one pod
  python -m launch.plan --config=FILE.py:ARG --find=v5e               the smallest v5e slice that it fits
  python -m launch.plan --all                                         every config on a matrix of pods: docs/pods.md

Every time, FLOP/s and utilisation that it prints is a projection: the program's own counts
over the chip's published rates, which nothing runs faster than.
"""

import dataclasses
import json
import pathlib
import runpy
import sys
from typing import Any

import jax

from launch import ptx, topology
from launch.planner import GIB, Plan, find, plan
from research import config, run
from research.errors import UserError, check
from research.report import table

ROOT = pathlib.Path(__file__).parents[1]
HOST = ("v5e:2x2",)  # what --all plans a config for that names no other PODS


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
