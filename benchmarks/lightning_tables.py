"""The tables of research/kernels/lightning_attention/README.md, from the records they are of.

python -m benchmarks.lightning_tables        # writes them

A table stands between `<!-- NAME -->` and `<!-- end -->`; one whose record is not there says how to take it.
"""

import json
from pathlib import Path
import re

from launch.kernels import GENERATIONS
from research.hardware import CHIPS
from research.report import table

ROOT = Path(__file__).parents[1]
README = ROOT / "research/kernels/lightning_attention/README.md"
RECORDS = ROOT / "benchmarks/records"
COMMANDS = {
  "lightning_cases": "python -m tests.kernels.lightning_cases --out benchmarks/records/lightning_cases.json",
  "lightning_attention": "python -m benchmarks.lightning_attention --out benchmarks/records/lightning_attention.json",
  "lightning_attention_gpu": "python -m benchmarks.lightning_attention --out"
  " benchmarks/records/lightning_attention_gpu.json",
  "lightning_crossover": "python -m benchmarks.lightning_crossover --out benchmarks/records/lightning_crossover.json",
  "schedules": "python -m launch.kernels --op=lightning_attention --write",
}


def tables() -> dict[str, str]:
  """{name: what stands between its marks}."""
  found = {name: from_record(name, f) for name, f in OF_RECORD.items()}
  return found | {"schedules": schedules()}


def from_record(name: str, f) -> str:
  path = RECORDS / f"{name}.json"
  if not path.exists():
    return f"Not taken yet: `{COMMANDS[name]}`"
  record = json.loads(path.read_text())
  rows = record["rows"]
  device = rows[0].get("device") or f"{record['cpu']}, {record['cores']} cores"
  if "libtpu" in rows[0]:
    device = f"compiled for {rows[0]['generation']} by libtpu {rows[0]['libtpu']}"
  where = f"`{COMMANDS[name]}`, {device}, jax {record['jax']}, {record['date']}, commit {record['commit'][:12]}."
  return f"{f(rows)}\n\n{where}"


def cases(rows) -> str:
  forms = {"float32": ".1e", "bfloat16": ".4f", "state of bfloat16": ".1e"}
  cells = [[f"`{r['path']}`", str(r["cases"]), *(f"{r[k]:{form}}" for k, form in forms.items())] for r in rows]
  worst = (f"{max(r[k] for r in rows):{form}}" for k, form in forms.items())
  cells.append(["all", f"{sum(r['cases'] for r in rows):,}", *worst])
  return table(["path", "cases", "float32", "bfloat16, of the best", "states of bfloat16"], cells)


def by_length(rows) -> str:
  """Lightning beside softmax attention; then, where it was measured, rows alone."""
  softmax = {(r["batch"], r["length"]): r for r in rows if r["attention"] == "softmax"}
  beside, alone = [], []
  for row in (r for r in rows if r["attention"] == "lightning"):
    peer = softmax.pop((row["batch"], row["length"]), None)
    shares = [f"{100 * row[k]:.0f} %" for k in ("fwd_roofline", "fwd_bwd_roofline") if k in row]
    if peer:
      times = [f"{r[k]:.1f}" for k in ("fwd_ms", "fwd_bwd_ms") for r in (row, peer)]
      faster = [f"{peer[k] / row[k]:.2f}" for k in ("fwd_ms", "fwd_bwd_ms")]
      beside.append([f"{row['batch']} x {row['length']:,}", *times, *faster, *shares])
    else:
      alone.append(row)
  roofline = ["of the roofline, forward", "with gradients"] if "fwd_roofline" in rows[0] else []
  head = [
    "rows",
    "forward, ms",
    "softmax",
    "with gradients, ms",
    "softmax",
    "times as fast",
    "with gradients",
    *roofline,
  ]
  told = table(head, beside)
  if alone:
    each = {k: [1e3 * r[k] / r["length"] for r in alone] for k in ("fwd_ms", "fwd_bwd_ms")}
    cells = [[f"{r['length']:,}", *(f"{each[k][i]:.2f}" for k in each)] for i, r in enumerate(alone)]
    cells.append(["largest / smallest", *(f"{max(x) / min(x):.2f}" for x in each.values())])
    told += "\n\n" + table(["one row of", "forward, us a token", "with gradients, us a token"], cells)
  return told


def crossover(rows) -> str:
  cells = [
    [
      f"{r['length']:,}",
      f"{r['lightning_us']:.0f}",
      f"{r['splash_us']:.0f}",
      f"{r['splash_us'] / r['lightning_us']:.2f}",
    ]
    for r in rows
  ]
  return table(["length", "lightning, us", "splash, us", "times as fast"], cells)


def schedules() -> str:
  """Of every case and kernel, the static time on each generation, by the libtpu that was asked for most of them."""
  path = README.with_name("schedules.json")
  if not path.exists():
    return f"Not taken yet: `{COMMANDS['schedules']}`"
  every = json.loads(path.read_text())
  version = max(every, key=lambda v: (sum(map(len, every[v].values())), v))
  cells: dict[tuple[str, str], dict[str, str]] = {}
  for generation, by_case in every[version].items():
    for case, by_program in by_case.items():
      for program, kernels in by_program.items():
        for kernel, found in kernels.items():
          name = kernel if program == "ours" else f"{program}: {kernel}"
          spills = f", {found['spills']} spills" if found["spills"] else ""
          told = f"{1e6 * found['cycles'] / CHIPS[generation].clock:,.0f}{spills}"
          cells.setdefault((case, name), {})[generation] = told
  rows = [[case, name, *(by.get(g, "") for g in GENERATIONS)] for (case, name), by in sorted(cells.items())]
  where = f"`{COMMANDS['schedules']}`, libtpu {version}; us, of one core on v4 and tpu7x."
  return f"{table(['case', 'kernel', *GENERATIONS], rows)}\n\n{where}"


OF_RECORD = {
  "lightning_cases": cases,
  "lightning_attention": by_length,
  "lightning_attention_gpu": by_length,
  "lightning_crossover": crossover,
}


def filled(text: str) -> str:
  """The README with every table as it is now."""
  for name, told in tables().items():
    text = re.sub(
      rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=told: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL
    )
  return text


if __name__ == "__main__":
  README.write_text(filled(README.read_text()))
