"""Memory and time of the chunked cross-entropy against all logits at once, value and gradients.

python -m benchmarks.cross_entropy [--out FILE.json]
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp

from benchmarks import record
from research.kernels.cross_entropy.api import cross_entropy

MEMORY_GOAL, TIME_GOAL = 0.03, 1.05  # of the naive loss, at the largest vocabulary
# (tokens, width, vocab): narrow, so that the naive loss fits on a small machine and the run in a minute.
TIMED = [(8192, 128, 4096), (2048, 128, 32768), (2048, 32, 131072)]
COMPILED = [(8192, 128, 32768), (8192, 128, 131072)]  # for their memory only
WINDOWS = 5


def naive(x, w, targets, weights):
  logits = jnp.einsum("btd,dv->btv", x, w, preferred_element_type=jnp.float32)
  of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return (weights * (jax.nn.logsumexp(logits, axis=-1) - of_target)).sum()


def measure(tokens: int, width: int, vocab: int, timed: bool) -> dict:
  losses = {"naive": naive, "chunked": functools.partial(cross_entropy, implementation="xla")}
  shapes = ((8, tokens // 8, width), "float32"), ((width, vocab), "float32"), ((8, tokens // 8), "int32")
  x, w, targets = (jax.ShapeDtypeStruct(*s) for s in shapes)
  weights = jax.ShapeDtypeStruct(targets.shape, "float32")
  steps = {
    name: jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(x, w, targets, weights).compile()
    for name, loss in losses.items()
  }
  row = {"tokens": tokens, "width": width, "vocab": vocab}
  for name, step in steps.items():
    row[f"{name}_mib"] = step.memory_analysis().temp_size_in_bytes / 2**20
  row["memory_ratio"] = row["chunked_mib"] / row["naive_mib"]
  return row | (_times(steps, x, w, targets) if timed else {})


def _times(steps, x, w, targets) -> dict:
  keys = jax.random.split(jax.random.key(0), 3)
  args = (
    jax.random.normal(keys[0], x.shape),
    jax.random.normal(keys[1], w.shape),
    jax.random.randint(keys[2], targets.shape, 0, w.shape[1]),
    jnp.ones(targets.shape),
  )
  seconds = {name: [] for name in steps}
  for window in range(1 + WINDOWS):
    for name, step in steps.items():  # taking turns: noise of the machine meets both
      start = time.perf_counter()
      jax.block_until_ready(step(*args))
      if window:  # the first warms up
        seconds[name].append(time.perf_counter() - start)
  medians = {name: statistics.median(s) for name, s in seconds.items()}
  return {f"{name}_ms": 1e3 * s for name, s in medians.items()} | {"time_ratio": medians["chunked"] / medians["naive"]}


def _cell(number: float | None) -> str:
  return "-" if number is None else str(number) if isinstance(number, int) else f"{number:.3f}"


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", help="write the rows and the machine as JSON")
  args = parser.parse_args()
  columns = (
    "tokens",
    "width",
    "vocab",
    "naive_mib",
    "chunked_mib",
    "memory_ratio",
    "naive_ms",
    "chunked_ms",
    "time_ratio",
  )
  print(" ".join(f"{name:>12}" for name in columns))
  rows = []
  for timed, shapes in ((True, TIMED), (False, COMPILED)):
    for shape in shapes:
      rows.append(measure(*shape, timed))
      cells = (_cell(rows[-1].get(c)) for c in columns)
      print(" ".join(f"{cell:>12}" for cell in cells), flush=True)
  print(f"goals at the largest vocabulary: memory_ratio <= {MEMORY_GOAL}, time_ratio <= {TIME_GOAL}")
  if args.out:
    record.write(args.out, "cross_entropy", rows)


if __name__ == "__main__":
  main()
