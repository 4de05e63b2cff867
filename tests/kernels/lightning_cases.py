"""Generated cases of lightning attention: every path against float64, values and gradients.

python -m tests.kernels.lightning_cases [--out FILE.json]     # all of them, some minutes

A case is a path, a shape, a dtype and a seed, from which come the operands, every head's decay
(1 and e^-8 often among them), how the rows are packed, and the state they start from. The default suite
runs some of them, see test_lightning_cases.py.
"""

import argparse
import functools
import sys
from typing import NamedTuple

import jax
from jax import P
from jax import numpy as jnp
import numpy as np

from benchmarks import record
from research.kernels.lightning_attention import reference
from research.kernels.lightning_attention.api import lightning_attention
from research.mesh import MeshConfig, make_mesh
from tests.kernels.test_lightning_attention import LOCAL, value_and_grads


class Shape(NamedTuple):
  batch: int
  length: int
  heads: int
  d_k: int
  d_v: int


# Odd head counts, d_k != d_v, lengths that fill no chunk: 64 tokens on a TPU, 16 to 64 on a GPU, 32 here in XLA.
SHAPES = [
  Shape(2, 1, 3, 64, 64),
  Shape(1, 1, 1, 128, 256),
  Shape(2, 36, 3, 64, 96),
  Shape(1, 65, 5, 64, 64),
  Shape(1, 100, 1, 128, 128),
  Shape(2, 132, 1, 96, 64),
  Shape(1, 200, 2, 64, 128),
  Shape(1, 140, 1, 256, 128),
  Shape(1, 300, 3, 96, 96),
  Shape(1, 72, 1, 256, 256),
]
SEEDS = 21  # of every shape and dtype
# Of float32 results, what rounding makes of a single token's products that cancel.
LIMITS = {"float32": 1e-5, "bfloat16": 1.1, "state of bfloat16": 1e-5}


def generate(shape: Shape, dtype: str, seed: int):
  """As `test_lightning_attention.operands`, of more kinds."""
  batch, length, heads, d_k, d_v = shape
  rng = np.random.default_rng((seed, *shape))
  normal = lambda *shape: np.asarray(jnp.asarray(rng.standard_normal(shape), dtype))
  state = lambda: rng.standard_normal((batch, heads, d_k, d_v)).astype(np.float32)
  q, k, v = normal(batch, length, heads, d_k), normal(batch, length, heads, d_k), normal(batch, length, heads, d_v)
  rate = np.exp(rng.uniform(np.log(1e-4), np.log(8), heads))
  rate = np.where(rng.random(heads) < 0.3, rng.choice([0.0, 8.0], heads), rate)
  # one document, a few, many, or one a token
  documents = rng.choice([1, 3, 12, length])
  ids = np.sort(rng.integers(0, documents, (batch, length)), axis=1) if documents < length else np.arange(length)
  ids = np.broadcast_to(rng.permutation(length)[ids], (batch, length)).astype(np.int32)  # their order says nothing
  before = state() if rng.random() < 0.7 else np.zeros((batch, heads, d_k, d_v), np.float32)
  args = q, k, v, np.exp(-rate).astype(np.float32), ids, before
  return args, (normal(batch, length, heads, d_v), state())


def context_parallel(args, cotangents):
  """Rows cut along their length over four devices."""
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:4])):
    return jax.block_until_ready(_context_parallel(args, cotangents))


@jax.jit
def _context_parallel(args, cotangents):
  def call(q, k, v, decay, ids, state):
    return lightning_attention(jax.reshard(q, P(None, "data")), k, v, decay, segment_ids=ids, initial_state=state)

  return value_and_grads(call, args, cotangents)


LOCAL = {"reference": reference.attention} | LOCAL
PATHS = {name: jax.jit(functools.partial(value_and_grads, f)) for name, f in LOCAL.items()}
PATHS["context_parallel"] = context_parallel
_TRUTH = jax.jit(functools.partial(value_and_grads, reference.attention))


def truth(args, cotangents):
  """In float64."""
  with jax.enable_x64(True):
    wide = lambda x: jnp.asarray(x, jnp.int32 if x.dtype == np.int32 else jnp.float64)
    return [np.asarray(x) for x in _TRUTH(*jax.tree.map(wide, (args, cotangents)))]


def takes(path: str, shape: Shape) -> bool:
  return path != "context_parallel" or shape.length % 4 == 0


def worst(path: str, shape: Shape, dtype: str, seeds: range) -> dict[str, float]:
  """The largest errors, by kind; each is of one result (output, state, or a gradient) of one case.

  float32: root mean square, over that of the truth. Of bfloat16 operands: bfloat16, over that of the
  truth rounded to bfloat16, which is the best there can be; and float32 states as above.
  """
  errors: dict[str, float] = {}
  for seed in seeds:
    case = generate(shape, dtype, seed)
    for got, want in zip(PATHS[path](*case), truth(*case), strict=True):
      rms = lambda x: np.sqrt(np.mean(np.square(x)))
      error = rms(np.asarray(got, np.float64) - want)
      if got.dtype == jnp.bfloat16:
        kind, least = "bfloat16", rms(np.asarray(jnp.asarray(want, jnp.bfloat16), np.float64) - want)
      else:
        kind, least = "float32" if dtype == "float32" else "state of bfloat16", rms(want)
      ratio = error / least if least else np.inf * error if error else 0.0
      errors[kind] = max(errors.get(kind, 0.0), float(ratio) if np.isfinite(error) else np.inf)
  return errors


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", help="write the rows and the machine as JSON")
  args = parser.parse_args()
  jax.config.update("jax_num_cpu_devices", 4)
  rows = []
  for path in PATHS:
    row = {"path": path, "cases": 0} | dict.fromkeys(LIMITS, 0.0)
    for shape in (shape for shape in SHAPES if takes(path, shape)):
      for dtype in ("float32", "bfloat16"):
        row["cases"] += SEEDS
        row |= {kind: max(row[kind], error) for kind, error in worst(path, shape, dtype, range(SEEDS)).items()}
    rows.append(row)
    print(
      " ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{value}" for name, value in row.items()),
      flush=True,
    )
  print(sum(row["cases"] for row in rows), "cases")
  if args.out:
    record.write(args.out, "lightning_cases", rows)
  beyond = [(row["path"], kind) for row in rows for kind, limit in LIMITS.items() if row[kind] > limit]
  sys.exit(f"beyond the limits {LIMITS}: {beyond}" if beyond else 0)


if __name__ == "__main__":
  main()
