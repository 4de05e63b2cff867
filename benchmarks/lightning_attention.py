"""Time of lightning attention by length, beside softmax attention at the same shapes.

python -m benchmarks.lightning_attention [--out FILE.json]

On a CPU: 8,192 tokens in rows of each length against our softmax attention in XLA; then one row alone, from
2k to 64k tokens, whose time a token should not change. On a GPU: rows of 2k to 128k tokens, beside cuDNN's
attention, and as a fraction of the time in which each input can be read and each result written once.
"""

import argparse
import functools

import jax
from jax import numpy as jnp
import numpy as np

from benchmarks import record
from benchmarks.attention import forward_and_backward, medians
from research import cpu
from research.errors import UserError
from research.hardware import CHIPS
from research.kernels.attention.api import attention
from research.kernels.dispatch import platform
from research.kernels.lightning_attention.api import lightning_attention

TOKENS = 8192  # of a batch on a CPU
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
LONG = (2048, 4096, 8192, 16384, 32768, 65536)
CPU_HEADS, CPU_DIM = 4, 64
GPU_LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
GPU_TOKENS, GPU_HEADS, GPU_DIM = 131072, 16, 128
PEER = {"cpu": "xla", "gpu": "cudnn"}


def measure(batch: int, length: int, heads: int, dim: int, dtype: str, softmax: bool, calls: int = 1) -> list[dict]:
  """A row for lightning attention and, if asked for and possible here, one for softmax attention."""
  decay = np.exp(-8 * np.arange(1, heads + 1) / heads).astype(np.float32)
  keys = jax.random.split(jax.random.key(0), 4)
  args = [jax.random.normal(key, (batch, length, heads, dim), dtype) for key in keys]
  forwards = {"lightning": lambda q, k, v, ids: lightning_attention(q, k, v, decay, segment_ids=ids)[0]}
  if softmax:
    forwards["softmax"] = lambda q, k, v, ids: attention(q, k, v, segment_ids=ids, implementation=PEER[platform()])
  programs = {}
  for name, f in forwards.items():
    steps = {
      "fwd": lambda q, k, v, ids, ct, f=f: f(q, k, v, ids),
      "fwd_bwd": functools.partial(forward_and_backward, f),
    }
    for what, step in steps.items():
      programs[name, what] = several(jax.jit(step), calls)
  try:
    seconds = medians(programs, (*args[:3], None, args[3]))
  except UserError as e:  # the peer does not run here
    print(e)
    return measure(batch, length, heads, dim, dtype, False, calls)
  rows = []
  for name in forwards:
    row = {"batch": batch, "length": length, "heads": heads, "head_dim": dim, "dtype": dtype, "attention": name}
    row |= {f"{what}_ms": 1e3 * seconds[name, what] / calls for what in ("fwd", "fwd_bwd")}
    rows.append(row | roofline(row))
  return rows


def several(f, calls: int):
  """`f`, called so often before anything waits: what it takes to start one is not seen on a GPU."""

  def run(*args):
    for _ in range(calls - 1):
      f(*args)
    return f(*args)

  return run


def roofline(row: dict) -> dict:
  """Least time by memory over time, where the bandwidth is known: q, k, v and out; with gradients, each of them too."""
  kind = jax.devices()[0].device_kind
  bandwidth = next((chip.bandwidth for chip in CHIPS.values() if chip.kind == kind), None)
  if bandwidth is None:
    return {}
  array = row["batch"] * row["length"] * row["heads"] * row["head_dim"] * jnp.dtype(row["dtype"]).itemsize
  least = {"fwd": 4 * array / bandwidth, "fwd_bwd": (4 + 7) * array / bandwidth}
  return {"device": kind} | {f"{what}_roofline": 1e3 * least[what] / row[f"{what}_ms"] for what in least}


def on_cpu() -> list[dict]:
  shapes = [(TOKENS // length, length, True) for length in LENGTHS] + [(1, length, False) for length in LONG]
  rows = []
  for batch, length, softmax in shapes:
    found = measure(batch, length, CPU_HEADS, CPU_DIM, "float32", softmax)
    rows += told(found)
  alone = [row for row in rows if row["batch"] == 1 and row["attention"] == "lightning"][-len(LONG) :]
  for what in ("fwd", "fwd_bwd"):
    each = [row[f"{what}_ms"] / row["length"] for row in alone]
    print(f"{what}: time a token from {LONG[0]:,} to {LONG[-1]:,}, longest over shortest: {max(each) / min(each):.2f}")
  return rows


def on_gpu() -> list[dict]:
  rows = []
  for length in GPU_LENGTHS:
    rows += told(measure(GPU_TOKENS // length, length, GPU_HEADS, GPU_DIM, "bfloat16", True, calls=10))
  return rows


def told(rows: list[dict]) -> list[dict]:
  for row in rows:
    shape = f"{row['batch']:4} x {row['length']:7,}  {row['attention']:9}"
    parts = [f"{what} {row[f'{what}_ms']:9.2f} ms" for what in ("fwd", "fwd_bwd")]
    parts += [
      f"{100 * row[key]:.0f} % of the {key.removesuffix('_roofline')} roofline" for key in row if "roofl" in key
    ]
    print(shape, *parts, sep="  ", flush=True)
  return rows


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", help="write the rows and the machine as JSON")
  args = parser.parse_args()
  cpu.tune()  # as research.run does: else memory that softmax has given back is what the next call waits for
  rows = on_gpu() if platform() == "gpu" else on_cpu()
  if args.out:
    record.write(args.out, "lightning_attention", rows)


if __name__ == "__main__":
  main()
