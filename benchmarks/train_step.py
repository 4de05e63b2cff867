"""Time of one training step, float32 on a CPU: this library as it runs for a user, against plain PyTorch.

python -m benchmarks.train_step [--out FILE.json]

A step is forward, backward, clipping, AdamW and the metrics that the loop logs. Every
implementation has a process of its own, started with nothing set, and the processes
take turns of a few steps. Rows hold one document each: PyTorch is told only that
attention is causal, while ours gets the segment ids it always gets.

The numbers count only if both train the same model: from the same weights on the
same batches the losses of the first steps have to agree, or this fails.
Needs torch (the extra `bench`); torch.compile needs a C++ compiler.
"""

import argparse
import functools
import importlib.metadata
import itertools
import multiprocessing
import os
import statistics
import time
from typing import NamedTuple

import numpy as np

from benchmarks import record


class Shape(NamedTuple):
  batch: int
  length: int
  vocab: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp_width: int


SHAPES = {
  "5.5M parameters": Shape(16, 256, 4096, 256, 4, 4, 4, 64, 768),
  "kvshift main": Shape(16, 256, 256, 128, 2, 4, 4, 32, 384),  # experiments/kvshift/configs/main.py
}
LR, WEIGHT_DECAY, B1, B2, EPS, CLIP = 1e-3, 0.1, 0.9, 0.95, 1e-8, 1.0
ROPE_BASE, NORM_EPS = 100_000.0, 1e-5
CHECKED, TURNS, STEPS = 5, 10, 4
TOLERANCE = 1e-4  # of the losses of the first CHECKED steps, relative


def batch_of(shape: Shape, step: int) -> tuple[np.ndarray, np.ndarray]:
  """(tokens, targets) of a step, int32 [batch, length]."""
  tokens = np.random.default_rng(step).integers(shape.vocab, size=(shape.batch, shape.length + 1))
  return tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)


def reprise(shape: Shape, weights: None):
  """(weights, step -> loss): what `python -m experiments.NAME` does between two batches, logging aside."""
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  import jax

  from research import cpu, optim
  from research.config import RunConfig
  from research.fit import Experiment, abstract_state, fresh_state, jit_step
  from research.mesh import MeshConfig, make_mesh, to_devices
  from research.models.decoder import next_token_loss
  from research.models.transformer import Transformer, TransformerConfig

  sizes = {name: size for name, size in shape._asdict().items() if name not in ("batch", "length")}
  model = TransformerConfig(**sizes, precision="float32", rope_base=ROPE_BASE, norm_eps=NORM_EPS)
  tx = optim.OptimizerConfig(
    lr=LR, weight_decay=WEIGHT_DECAY, b1=B1, b2=B2, eps=EPS, clip=CLIP, schedule="constant", warmup=0
  )
  cfg = RunConfig("benchmark", batch=shape.batch, length=shape.length, tx=tx)
  exp = Experiment(init=lambda key: Transformer(key, model), loss=next_token_loss, data=None, tx=optim.make(tx, 1))
  cpu.tune()  # as research.run does, and no sooner
  jax.set_mesh(make_mesh(MeshConfig()))
  abstract = abstract_state(exp)
  state = fresh_state(exp, abstract, 0)
  train_step = jit_step(exp, cfg, abstract)
  ones = np.ones((shape.batch, shape.length), np.int32)
  positions = np.broadcast_to(np.arange(shape.length, dtype=np.int32), ones.shape)
  rest = {"segment_ids": ones, "positions": positions, "weights": ones.astype(np.float32)}
  blocks = state.model.blocks
  weights = {
    "embed": state.model.embed,
    "head": state.model.head,
    "qkv": blocks.attention.qkv,
    "out": blocks.attention.out,
    "up": blocks.mlp.up,
    "down": blocks.mlp.down,
  }
  weights = {name: np.array(w[...]) for name, w in weights.items()}

  def step(tokens, targets):
    nonlocal state
    state, metrics = train_step(state, to_devices({"tokens": tokens, "targets": targets, **rest}))
    return float(jax.block_until_ready(metrics)["loss"])

  return weights, step


def pytorch(shape: Shape, weights: dict, compiled: bool):
  """(None, step -> loss): the same decoder in plain PyTorch, from the same weights."""
  import torch
  from torch import nn
  from torch.nn import functional as F

  torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
  width, heads, kv_heads, head_dim = shape.width, shape.heads, shape.kv_heads, shape.head_dim

  def linear(matrix):  # [in, out]
    layer = nn.Linear(*matrix.shape, bias=False)
    layer.weight = nn.Parameter(torch.tensor(np.ascontiguousarray(matrix.T)))
    return layer

  angle = np.arange(shape.length)[:, None] * ROPE_BASE ** (-np.arange(0, head_dim, 2) / head_dim)
  cos, sin = (torch.tensor(f(angle), dtype=torch.float32) for f in (np.cos, np.sin))

  def rotate(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

  class Block(nn.Module):
    def __init__(self, i):
      super().__init__()
      # ours keeps a head's queries beside its key and value; the usual order is all queries, keys, values
      q, k, v = np.split(weights["qkv"][i], [heads // kv_heads, heads // kv_heads + 1], axis=2)
      self.qkv = linear(np.concatenate([x.reshape(width, -1) for x in (q, k, v)], axis=1))
      self.out = linear(weights["out"][i].reshape(-1, width))
      self.up = linear(weights["up"][i].reshape(width, -1))
      self.down = linear(weights["down"][i])
      self.norm1, self.norm2 = nn.RMSNorm(width, NORM_EPS), nn.RMSNorm(width, NORM_EPS)

    def forward(self, x):
      batch, length, _ = x.shape
      y = self.qkv(self.norm1(x)).view(batch, length, -1, head_dim).transpose(1, 2)
      q, k, v = y.split([heads, kv_heads, kv_heads], dim=1)
      y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=heads != kv_heads)
      x = x + self.out(y.transpose(1, 2).reshape(batch, length, -1))
      gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
      return x + self.down(F.silu(gate) * up)

  class Decoder(nn.Module):
    def __init__(self):
      super().__init__()
      self.embed = nn.Embedding(shape.vocab, width, _weight=torch.tensor(weights["embed"]))
      self.blocks = nn.Sequential(*[Block(i) for i in range(shape.layers)])
      self.norm = nn.RMSNorm(width, NORM_EPS)
      self.head = linear(weights["head"])

    def forward(self, tokens, targets):
      logits = self.head(self.norm(self.blocks(self.embed(tokens))))
      return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

  model = Decoder()
  groups = [
    {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
    {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
  ]
  optimizer = torch.optim.AdamW(groups, lr=LR, betas=(B1, B2), eps=EPS, fused=True)
  forward = torch.compile(model) if compiled else model

  def step(tokens, targets):
    loss = forward(torch.from_numpy(tokens).long(), torch.from_numpy(targets).long())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

  return None, step


IMPLEMENTATIONS = {
  "reprise": reprise,
  "torch eager": functools.partial(pytorch, compiled=False),
  "torch.compile": functools.partial(pytorch, compiled=True),
}


def serve(pipe, name: str, shape: Shape, weights: dict | None) -> None:
  """A worker: sends its weights, then for each number of steps asked for (losses, seconds)."""
  weights, step = IMPLEMENTATIONS[name](shape, weights)
  pipe.send(weights)
  numbers = itertools.count()
  while count := pipe.recv():
    losses, seconds = [], []
    for number in itertools.islice(numbers, count):
      batch = batch_of(shape, number)
      start = time.perf_counter()
      losses.append(step(*batch))
      seconds.append(time.perf_counter() - start)
    pipe.send((losses, seconds))


def measure(label: str, shape: Shape) -> list[dict]:
  context = multiprocessing.get_context("spawn")
  pipes, workers, weights = {}, [], None
  for name in IMPLEMENTATIONS:
    pipes[name], theirs = context.Pipe()
    workers.append(context.Process(target=serve, args=(theirs, name, shape, weights), daemon=True))
    workers[-1].start()
    theirs.close()  # so that a worker's death ends the wait for it
    weights = pipes[name].recv() or weights

  def turn(name, steps):
    pipes[name].send(steps)
    return pipes[name].recv()

  first = {name: turn(name, CHECKED)[0] for name in pipes}  # compiles and warms up, too
  for name, losses in first.items():
    np.testing.assert_allclose(losses, first["reprise"], rtol=TOLERANCE, err_msg=f"{name} trains another model")
  seconds = {name: [] for name in pipes}
  for _ in range(TURNS):
    for name in pipes:  # taking turns: noise of the machine meets all
      time.sleep(0.3)  # idle OpenMP threads spin for a while
      turn(name, 1)
      seconds[name].append(statistics.median(turn(name, STEPS)[1]))
  for pipe, worker in zip(pipes.values(), workers, strict=True):
    pipe.send(0)
    worker.join()
  median = {name: statistics.median(s) for name, s in seconds.items()}
  return [
    {
      "shape": label,
      **shape._asdict(),
      "implementation": name,
      "step_ms": 1e3 * median[name],
      "min_ms": 1e3 * min(seconds[name]),
      "max_ms": 1e3 * max(seconds[name]),
      # Of the least times: what else runs on the machine only adds, and to torch's barriers most.
      "ours_over_this": min(seconds["reprise"]) / min(seconds[name]),
      "first_losses": first[name],
      "torch": importlib.metadata.version("torch"),
    }
    for name in pipes
  ]


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", help="write the rows and the machine as JSON")
  args = parser.parse_args()
  print(f"milliseconds a step: median (least to most) of {TURNS} turns; then our least over the least of each")
  rows = []
  for label, shape in SHAPES.items():
    print(label)
    for row in measure(label, shape):
      rows.append(row)
      spread = f"({row['min_ms']:.0f} to {row['max_ms']:.0f})"
      print(f"  {row['implementation']:14} {row['step_ms']:7.1f} {spread:16} {row['ours_over_this']:.2f}", flush=True)
  if args.out:
    record.write(args.out, "train_step", rows)


if __name__ == "__main__":
  main()
