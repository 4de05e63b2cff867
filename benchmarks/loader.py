"""Tokens a second that the text loader yields on two cores; goal: 1M.

python -m benchmarks.loader [--out FILE.json]
"""

import argparse
import os
import statistics
import time

from benchmarks import record
from research import data

GOAL = 1e6  # tokens / s
LENGTH, BATCH, STEPS, WINDOWS = 1024, 32, 50, 9


def measure(tokenizer: str) -> dict:
  start = time.perf_counter()
  loaded = data.load(data.TextConfig(tokenizer=tokenizer), LENGTH, seed=0)
  load_s = time.perf_counter() - start
  batches = iter(data.batches(loaded.split("train"), BATCH, seed=0, train=True))

  def window() -> float:
    start = time.perf_counter()
    for _ in range(STEPS):
      next(batches)
    return STEPS * BATCH * LENGTH / (time.perf_counter() - start)

  window()  # warm-up: threads, and a prefetch buffer that was filled before the clock ran
  rates = [window() for _ in range(WINDOWS)]
  return {
    "tokenizer": tokenizer,
    "length": LENGTH,
    "batch": BATCH,
    "tokens_per_s": statistics.median(rates),
    "min": min(rates),
    "max": max(rates),
    "goal": GOAL,
    "load_s": load_s,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", help="write a record to this JSON file")
  args = parser.parse_args()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
  print(f"rows of {LENGTH}, batch {BATCH}: million tokens/s, median of {WINDOWS} windows of {STEPS} batches")
  print(f"{'tokenizer':10} {'median':>7} {'min':>7} {'max':>7} {'goal':>6} {'load s':>7}")
  rows = []
  for tokenizer in ("bytes", "bpe"):
    row = measure(tokenizer)
    rates = " ".join(f"{row[key] / 1e6:7.1f}" for key in ("tokens_per_s", "min", "max"))
    print(f"{tokenizer:10} {rates} {GOAL / 1e6:6.1f} {row['load_s']:7.1f}", flush=True)
    rows.append(row)
  if args.out:
    record.write(args.out, "loader", rows)


if __name__ == "__main__":
  main()
