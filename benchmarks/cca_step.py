"""What a step of condition contrastive alignment costs: time and memory against a step of likelihood on the same rows.

python -m benchmarks.cca_step [--out FILE.json] [--only time|memory]

An image goes through the model twice, under its own and another's class, both in one batch; then the reference reads
the two again, or its log-likelihoods have been computed ahead. In units of a forward pass a row costs 3 (likelihood), 8
(alignment) or 6 (ahead): ratios of 2.67 and 2, a little more where the head is a large part, as its logits are made
again for the gradients.

Time: float32 on this CPU, in one process, the steps in turn; ratios of medians. The losses of both ways to the
reference have to agree at the first step. Memory: a LlamaGen-L on a v5e slice, by the TPU compiler (the extra
`aot`; left out without it); what one chip needs for the whole step.
"""

import argparse
import functools
import statistics
import time
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from benchmarks import record
from experiments.cca import tuning
from experiments.cca.tuning import TuningConfig
from launch import topology
from launch.planner import shard_bytes
from research import cpu, optim
from research.config import RunConfig
from research.fit import Experiment, abstract_batch, abstract_state, fresh_state, jit_step
from research.mesh import MeshConfig, make_mesh, on_devices, to_devices
from research.metrics import Mean
from research.models import llamagen
from research.models.llamagen import LlamaGen, LlamaGenConfig
from research.models.var import VAR, VARConfig
from research.models.vqvae import VQVAE, VQVAEConfig
from research.optim import OptimizerConfig

NO_DROPOUT = {"token_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0, "class_dropout": 0.0}
BOOK = {"vocab": 4096, "code_width": 32, "scales": (1, 2, 3, 4, 5, 6, 8)}
# rows of a step, and the model
MODELS = {
  "llamagen": (
    8,
    LlamaGenConfig(4096, 256, 4, 4, 4, 64, 768, classes=10, tokens=256, precision="float32", **NO_DROPOUT),
  ),
  "var": (
    8,
    VARConfig(**BOOK, classes=10, width=256, layers=4, heads=4, mlp_width=1024, class_dropout=0.0, precision="float32"),
  ),
}
STEPS = ("likelihood", "cca", "cca, reference ahead")
TUNING = TuningConfig(beta=0.02, lam=100.0)
ROUNDS = 9
# LlamaGen-L at 256 pixels as it was tuned: 256 rows a step; bfloat16, layers made again in the backward pass
SLICE, ROWS = "v5e:4x4", 256


class Way(NamedTuple):
  """An experiment, and which of the arrays of a batch it reads."""

  exp: Experiment
  cfg: RunConfig


def way(name: str, rows: int, model: LlamaGenConfig | VARConfig, partition: str = MeshConfig.partition) -> Way:
  """One of STEPS."""
  shapes = tuning.batch_shapes(TUNING, model, rows, cached=name.endswith("ahead"))
  if name == "likelihood":
    loss = likelihood
  else:
    loss = functools.partial(tuning.loss, cfg=TUNING)
  cfg = RunConfig("benchmark", batch=rows, length=model.tokens, tx=OptimizerConfig(lr=1e-5, warmup=0))
  make = LlamaGen if isinstance(model, LlamaGenConfig) else VAR
  exp = Experiment(
    init=lambda key: make(key, model, partition),
    loss=loss,
    data=None,
    tx=optim.make(cfg.tx, cfg.steps),
    batch=lambda: shapes,
    reference=name == "cca",
  )
  return Way(exp, cfg)


def likelihood(model: Any, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, Mean]:
  """Cross-entropy of the rows' codes under their classes."""
  if isinstance(model, LlamaGen):
    return llamagen.loss(model, {"tokens": batch["codes"], "labels": batch["labels"]}, None)
  log_p = model.log_likelihood(model(batch["inputs"], batch["labels"]), batch["codes"])
  return {"loss": Mean(-jnp.sum(log_p), jnp.asarray(batch["codes"].size, jnp.float32))}


def times(label: str) -> list[dict]:
  """Rows of the record: milliseconds of each step, in turn."""
  rows, model = MODELS[label]
  ways = {name: way(name, rows, model) for name in STEPS}
  abstract = abstract_state(ways["cca"].exp)
  states = {name: fresh_state(w.exp, abstract, 0) for name, w in ways.items()}
  reference = fresh_state(ways["cca"].exp, abstract, 0).model
  batch = data(rows, model, reference)
  steps, losses, seconds = {}, {}, {name: [] for name in ways}
  for name, w in ways.items():
    given = {key: batch[key] for key in w.exp.batch()} | ({"others": batch["others"]} if name == "cca" else {})
    of = reference if w.exp.reference else None
    steps[name] = (jit_step(w.exp, w.cfg, abstract).lower(states[name], given, of).compile(), given, of)
  for turn in range(ROUNDS + 1):  # the first warms up
    for name in list(steps)[:: 1 if turn % 2 else -1]:
      step, given, of = steps[name]
      start = time.perf_counter()
      states[name], metrics = jax.block_until_ready(step(states[name], given, of))
      took = time.perf_counter() - start
      if turn:
        seconds[name].append(took)
      else:
        losses[name] = {key: float(x) for key, x in metrics.items()}
  online, ahead = (losses[name] for name in STEPS[1:])
  said = "the log-likelihoods computed ahead are not the reference's"
  np.testing.assert_allclose(ahead["loss"], online["loss"], rtol=1e-4, err_msg=said)
  median = {name: statistics.median(took) for name, took in seconds.items()}
  return [
    {
      "model": label,
      "rows": rows,
      "tokens": model.tokens,
      "step": name,
      "step_ms": 1e3 * median[name],
      "min_ms": 1e3 * min(seconds[name]),
      "max_ms": 1e3 * max(seconds[name]),
      "over_likelihood": median[name] / median["likelihood"],
      "over_likelihood_of_least": min(seconds[name]) / min(seconds["likelihood"]),
      "first_loss": losses[name]["loss"],
    }
    for name in STEPS
  ]


def data(rows: int, model: LlamaGenConfig | VARConfig, reference: Any) -> dict[str, jax.Array]:
  """Random codes and classes, with all that any of STEPS reads."""
  rng = np.random.default_rng(0)
  codes = rng.integers(model.vocab, size=(rows, model.tokens), dtype=np.int32)
  labels = rng.integers(model.classes, size=rows, dtype=np.int32)
  others = tuning.fixed_pairs(labels, 0)
  out = {"codes": codes, "labels": labels, "others": others, "weights": np.ones(rows, np.float32)}
  tokenizer = None
  if isinstance(model, VARConfig):
    book = VQVAEConfig(**BOOK, latent=8, channels=32, mult=(1,), blocks=1)
    tokenizer = jax.jit(functools.partial(VQVAE, cfg=book))(jax.random.key(0))
    out["inputs"] = np.asarray(jax.jit(lambda tokenizer, codes: tokenizer.inputs(codes))(tokenizer, codes))
  options = {"tokenizer": tokenizer, "batch": rows}
  out["reference_log_probs"] = tuning.reference_log_probs(reference, codes, labels, others, **options)
  return to_devices(out)


def memory(name: str) -> dict:
  """A row of the record: bytes that one chip of SLICE needs for a step of LlamaGen-L."""
  model = llamagen.official("L", precision="bfloat16", remat="full", **NO_DROPOUT)
  pod, mesh = topology.parse(SLICE), MeshConfig(partition="fsdp")
  with jax.set_mesh(topology.make_mesh(mesh, pod)):
    w = way(name, ROWS, model, mesh.partition)
    state, batch = on_devices(abstract_state(w.exp)), on_devices(abstract_batch(w.exp))
    compiled = jit_step(w.exp, w.cfg, state).lower(state, batch, state.model if w.exp.reference else None).compile()
  stats = compiled.memory_analysis()
  needed = stats.argument_size_in_bytes + stats.temp_size_in_bytes
  needed += stats.output_size_in_bytes - stats.alias_size_in_bytes
  held = {"parameters": state.model, "adam": state.opt, "reference": state.model if w.exp.reference else ()}
  return {
    "model": "LlamaGen-L", "rows": ROWS, "tokens": model.tokens, "step": name, "slice": SLICE, "bytes": needed,
    "temporaries": stats.temp_size_in_bytes, "usable": pod.usable,
  } | {part: sum(map(shard_bytes, jax.tree.leaves(tree))) for part, tree in held.items()}  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", help="write the record there")
  parser.add_argument("--only", choices=("time", "memory"), help="one of the two parts")
  args = parser.parse_args()
  topology.environment()
  cpu.tune()
  found = []
  with jax.set_mesh(make_mesh(MeshConfig())):
    for label in MODELS if args.only != "memory" else ():
      found += times(label)
      for row in found[-len(STEPS) :]:
        spread = f"({row['min_ms']:.0f} to {row['max_ms']:.0f})"
        print(
          f"{label:9} {row['step']:22} {row['step_ms']:8.0f} ms {spread:16} {row['over_likelihood']:.2f}", flush=True
        )
  lacking = topology.missing(topology.parse(SLICE))
  if args.only != "time" and lacking:
    print(f"memory is not measured: {lacking}")
  elif args.only != "time":
    for name in STEPS:
      row = memory(name)
      found.append(row)
      print(f"{row['model']} {name:22} {row['bytes'] / 2**20:8.0f} MiB a chip of {SLICE}", flush=True)
  if args.out:
    record.write(args.out, "cca_step", found)


if __name__ == "__main__":
  main()
