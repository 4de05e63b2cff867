"""Time of every attention that runs here, against jax.nn's, on packed rows.

python -m benchmarks.attention [--out FILE.json]
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from research.errors import UserError
from research.kernels.attention.api import attention
from research.kernels.attention.cases import CASES, Case
from research.kernels.dispatch import platform

CPU_CASES = [
  CASES["nano"],
  Case(16, 256, 8, 8, 32, "float32"),
  Case(8, 512, 4, 4, 64, "float32"),
  Case(8, 512, 8, 2, 32, "float32"),
]
WINDOWS = 11


def jax_nn(q, k, v, segment_ids):
  mask = (segment_ids[:, :, None] == segment_ids[:, None])[:, None]
  return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="xla")


def measure(case: Case) -> list[dict]:
  args = _operands(case)
  forwards = {"jax.nn": jax_nn}
  for name in ("splash", "cudnn", "xla"):
    call = lambda q, k, v, ids, name=name: attention(q, k, v, segment_ids=ids, implementation=name)
    try:
      jax.eval_shape(call, *args[:4])
    except UserError:  # not on this platform, or not this case
      continue
    forwards[name] = call
  programs = {}
  for name, f in forwards.items():
    programs[name, "fwd"] = jax.jit(lambda q, k, v, ids, ct, f=f: f(q, k, v, ids))
    programs[name, "fwd_bwd"] = jax.jit(functools.partial(forward_and_backward, f))
  seconds = medians(programs, args)
  return [
    case._asdict()
    | {"implementation": name}
    | {f"{what}_ms": 1e3 * seconds[name, what] for what in ("fwd", "fwd_bwd")}
    | {"ratio": seconds[name, "fwd_bwd"] / seconds["jax.nn", "fwd_bwd"]}
    for name in forwards
  ]


def forward_and_backward(f, q, k, v, ids, ct):
  out, vjp = jax.vjp(lambda q, k, v: f(q, k, v, ids), q, k, v)
  return out, vjp(ct)


def medians(programs, args) -> dict:
  seconds = {name: [] for name in programs}
  for window in range(1 + WINDOWS):
    for name, program in programs.items():  # taking turns: noise of the machine meets all
      start = time.perf_counter()
      jax.block_until_ready(program(*args))
      if window:  # the first compiles
        seconds[name].append(time.perf_counter() - start)
  return {name: statistics.median(s) for name, s in seconds.items()}


def _operands(case: Case):
  keys = jax.random.split(jax.random.key(0), 4)
  shape = lambda heads: (case.batch, case.length, heads, case.head_dim)
  heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
  q, k, v, ct = (jax.random.normal(key, shape(h), case.dtype) for key, h in zip(keys, heads, strict=True))
  ids = np.sort(np.random.default_rng(0).integers(0, 3, (case.batch, case.length)), axis=1)
  return q, k, v, jnp.asarray(ids, jnp.int32), ct


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", help="write the rows and the machine as JSON")
  args = parser.parse_args()
  print("batch length heads kv_heads head_dim dtype; milliseconds; ratio of forward + backward to jax.nn's")
  rows = []
  for case in CPU_CASES if platform() == "cpu" else CASES.values():
    for row in measure(case):
      rows.append(row)
      times = f"fwd {row['fwd_ms']:8.2f}  fwd+bwd {row['fwd_bwd_ms']:8.2f}  ratio {row['ratio']:.2f}"
      print(f"{' '.join(map(str, case)):32} {row['implementation']:8} {times}", flush=True)
  if args.out:
    record.write(args.out, "attention", rows)


if __name__ == "__main__":
  main()
