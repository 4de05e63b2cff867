"""What the shift costs: a training step with KV shifting against the same with plain attention, in one process.

python -m benchmarks.shift [--out FILE.json]

Steps of the two take turns; the ratio is that of the medians. Beside it what does not
depend on the machine's mood: FLOPs and bytes of the compiled steps, as XLA counts them.
Goal: 1.02.
"""

import argparse
import functools
import statistics
import time

import jax
import numpy as np

from benchmarks import record
from experiments.kvshift.experiment import ATTENTIONS
from research import cpu, optim
from research.config import RunConfig
from research.fit import Experiment, abstract_state, fresh_state, jit_step
from research.mesh import MeshConfig, make_mesh, to_devices
from research.models.decoder import next_token_loss
from research.models.transformer import Transformer, TransformerConfig
from research.optim import OptimizerConfig

# batch, length, and the model: the experiment's main config, and one in which attention is a smaller part
SHAPES = {
  "kvshift main": (16, 256, TransformerConfig(256, 128, 2, 4, 4, 32, 384, precision="float32")),
  "5.5M parameters": (8, 512, TransformerConfig(4096, 256, 4, 4, 4, 64, 768, precision="float32")),
  "grouped queries": (8, 512, TransformerConfig(4096, 256, 4, 8, 2, 32, 768, precision="float32")),
}
ROUNDS, STEPS = 30, 2


def compiled_step(attention: str, batch: int, length: int, model: TransformerConfig):
  """(compiled step, state) under the current mesh."""
  cfg = RunConfig("benchmark", batch=batch, length=length, tx=OptimizerConfig(warmup=0))
  init = functools.partial(Transformer, cfg=model, mix=ATTENTIONS[attention])
  exp = Experiment(init=init, loss=next_token_loss, data=None, tx=optim.make(cfg.tx, cfg.steps))
  abstract = abstract_state(exp)
  state = fresh_state(exp, abstract, 0)
  step = jit_step(exp, cfg, abstract)
  return step.lower(state, rows(batch, length, model.vocab)).compile(), state


def rows(batch: int, length: int, vocab: int):
  """A batch of full rows of one document."""
  tokens = np.random.default_rng(0).integers(vocab, size=(batch, length + 1)).astype(np.int32)
  return to_devices(
    {
      "tokens": tokens[:, :-1],
      "targets": tokens[:, 1:],
      "segment_ids": np.ones((batch, length), np.int32),
      "positions": np.tile(np.arange(length, dtype=np.int32), (batch, 1)),
      "weights": np.ones((batch, length), np.float32),
    }
  )


def measure(name: str) -> dict:
  """One row of the record."""
  batch, length, model = SHAPES[name]
  steps = {attention: compiled_step(attention, batch, length, model) for attention in ("plain", "kvshift")}
  data = rows(batch, length, model.vocab)
  costs = {attention: step.cost_analysis() for attention, (step, _) in steps.items()}
  seconds: dict[str, list[float]] = {attention: [] for attention in steps}
  for turn in range(ROUNDS + 2):
    order = list(steps) if turn % 2 else list(steps)[::-1]
    for attention in order:
      step, state = steps[attention]
      start = time.perf_counter()
      for _ in range(STEPS):
        state, metrics = step(state, data)
      jax.block_until_ready((state, metrics))
      if turn >= 2:  # the first rounds warm up
        seconds[attention].append((time.perf_counter() - start) / STEPS)
      steps[attention] = step, state
  median = {attention: statistics.median(values) for attention, values in seconds.items()}
  ratio = lambda key: costs["kvshift"][key] / costs["plain"][key]
  return {
    "shape": name,
    "plain_ms": 1e3 * median["plain"],
    "kvshift_ms": 1e3 * median["kvshift"],
    "time_ratio": median["kvshift"] / median["plain"],
    "time_ratio_of_least": min(seconds["kvshift"]) / min(seconds["plain"]),
    "flops_ratio": ratio("flops"),
    "bytes_ratio": ratio("bytes accessed"),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", help="write the record there")
  args = parser.parse_args()
  cpu.tune()
  jax.set_mesh(make_mesh(MeshConfig()))
  found = []
  for name in SHAPES:
    found.append(measure(name))
    row = found[-1]
    times = f"{row['plain_ms']:.1f} -> {row['kvshift_ms']:.1f} ms, ratio {row['time_ratio']:.3f}"
    counts = f"FLOPs {row['flops_ratio']:.4f}, bytes {row['bytes_ratio']:.4f}"
    print(f"{name}: {times} (of the least {row['time_ratio_of_least']:.3f}); {counts}")
  if args.out:
    record.write(args.out, "shift", found)


if __name__ == "__main__":
  main()
