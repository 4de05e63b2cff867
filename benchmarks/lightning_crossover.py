"""From which length on lightning attention beats softmax attention on a TPU, by the schedules of their kernels.

python -m benchmarks.lightning_crossover [--generation v5e] [--out FILE.json]

A projection, not a measurement: forward and backward kernels of `research/kernels/lightning_attention/cases.py`
and of jax's splash attention (no phases, no norm, no projections around them), compiled for one chip at each
length. A kernel takes the longer of its schedule (see launch/kernels.py) and of the time to read its operands
and write its results once.
"""

import argparse

from benchmarks import record
from launch import kernels
from research.kernels.lightning_attention.cases import Case, programs

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
HEADS, DIM = 8, 128


def seconds(compiler: kernels.Compiler, length: int, generation: str) -> dict[str, float]:
  """{program: least time of its kernels together}."""
  total: dict[str, float] = {}
  for program, kernel in compiler.kernels(programs(Case(1, length, HEADS, DIM, DIM, "bfloat16")), generation):
    row = kernels.row("lightning_attention", str(length), generation, program, kernel, {})
    total[program] = total.get(program, 0.0) + max(row["static_seconds"], row["hbm_floor_seconds"])
  return total


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--generation", default="v5e", choices=list(kernels.GENERATIONS))
  parser.add_argument("--out", help="write the rows as JSON")
  args = parser.parse_args()
  rows = []
  with kernels.Compiler() as compiler:
    for length in LENGTHS:
      found = seconds(compiler, length, args.generation)
      row = {"generation": args.generation, "libtpu": kernels.version(), "length": length, "heads": HEADS, "dim": DIM}
      rows.append(row | {f"{'lightning' if name == 'ours' else name}_us": 1e6 * t for name, t in found.items()})
      ratio = found["splash"] / found["ours"]
      print(
        f"{length:6,}  " + "  ".join(f"{n} {1e6 * t:8.1f} us" for n, t in found.items()) + f"  {ratio:.2f}", flush=True
      )
  if args.out:
    record.write(args.out, "lightning_crossover", rows)


if __name__ == "__main__":
  main()
