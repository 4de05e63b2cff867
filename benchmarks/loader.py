"""Tokens a second that the text loader yields on two cores; goal: 1M. And how long a training step waits for them.

python -m benchmarks.loader [--out FILE.json]

`bytes` and `bpe` are packed from memory, `shards` from ArrayRecord shards of the bpe's
tokens in a temporary directory (which the system keeps in memory once read), `mixture`
is shards and bpe, 0.7 to 0.3. The share of waiting is that of the steps of
experiments/kvshift/configs/main.py on this CPU, rows of 256; goal: under 1 %.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
import time

import jax

from benchmarks import record
from research import config, cpu, data, run
from research.fit import abstract_state, fresh_state, jit_step
from research.mesh import to_devices
from research.tools import tokenize

GOAL, WAIT_GOAL = 1e6, 0.01  # tokens / s, share of a step
LENGTH, BATCH, STEPS, WINDOWS = 1024, 32, 50, 9
TRAIN_STEPS = 40


def configs(root: pathlib.Path) -> dict[str, data.TextConfig]:
  """By name; the shards are written under `root`."""
  bpe = data.TextConfig(tokenizer="bpe")
  tokenize.write(bpe, root, 2**20)
  shards = f"shards:{root}"
  return {
    "bytes": data.TextConfig(),
    "bpe": bpe,
    "shards": data.TextConfig(source=(shards,), tokenizer="bpe"),
    "mixture": data.TextConfig(source=(shards, "stdlib"), weights=(0.7, 0.3), tokenizer="bpe"),
  }


def measure(name: str, cfg: data.TextConfig) -> dict:
  start = time.perf_counter()
  loaded = data.load(cfg, LENGTH, seed=0)
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
    "tokenizer": cfg.tokenizer,
    "source": name,
    "length": LENGTH,
    "batch": BATCH,
    "tokens_per_s": statistics.median(rates),
    "min": min(rates),
    "max": max(rates),
    "goal": GOAL,
    "load_s": load_s,
    "wait_share": wait_share(cfg),
    "wait_goal": WAIT_GOAL,
  }


def wait_share(text: data.TextConfig) -> float:
  """The share of training's time between asking for a batch and having it."""
  vocab = 256 if text.tokenizer == "bytes" else text.bpe_vocab
  _, cfg = config.expand(config.load("experiments/kvshift/configs/main.py", [f"model.vocab={vocab}"]))[0]
  mesh, exp = run.prepare(config.experiment_module(cfg.experiment).build, cfg)
  rows = data.load(text, cfg.length, seed=0).split("train")
  batches = iter(data.batches(rows, cfg.batch, seed=0, train=True))
  waited = 0.0
  with jax.set_mesh(mesh):
    abstract = abstract_state(exp)
    state = fresh_state(exp, abstract, 0)
    step = jit_step(exp, cfg, abstract)
    for i in range(TRAIN_STEPS + 2):
      if i == 2:  # compiled, and the prefetched batches of the start are used
        begin, waited = time.perf_counter(), 0.0
      asked = time.perf_counter()
      batch = next(batches)
      waited += time.perf_counter() - asked
      state, metrics = step(state, to_devices(batch))
      jax.block_until_ready(metrics)
  return waited / (time.perf_counter() - begin)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", help="write a record to this JSON file")
  args = parser.parse_args()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
  cpu.tune()
  with tempfile.TemporaryDirectory() as root:
    sources = configs(pathlib.Path(root))
    print(f"rows of {LENGTH}, batch {BATCH}: million tokens/s, median of {WINDOWS} windows of {STEPS} batches")
    print(f"{'source':10} {'median':>7} {'min':>7} {'max':>7} {'goal':>6} {'load s':>7} {'wait %':>7} {'goal':>5}")
    rows = []
    for name, cfg in sources.items():
      row = measure(name, cfg)
      rates = " ".join(f"{row[key] / 1e6:7.1f}" for key in ("tokens_per_s", "min", "max"))
      waits = f"{100 * row['wait_share']:7.2f} {100 * WAIT_GOAL:5.1f}"
      print(f"{name:10} {rates} {GOAL / 1e6:6.1f} {row['load_s']:7.1f} {waits}", flush=True)
      rows.append(row)
  if args.out:
    record.write(args.out, "loader", rows)


if __name__ == "__main__":
  main()
