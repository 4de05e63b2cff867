"""Drawing images token by token, with and without guidance, float32 on a CPU: this library against plain PyTorch.

python -m benchmarks.image_sampling [--out FILE.json] [--shape NAME ...]

PyTorch (the extra `bench`) gets the same models and weights, with a cache of keys and values, in the loop that the
released code has; where it is not installed only ours is measured. Both draw the codes of a batch; decoding them is
not timed. Each implementation has a process of its own, and the two take turns.

The numbers count only if both draw from the same model: fed with the same codes, guided, their logits have to agree
at every token, or this fails. Goal: guidance costs at least 1.9 times what none does.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import multiprocessing
import os
import statistics
import time
from typing import NamedTuple

import numpy as np

from benchmarks import record


class Shape(NamedTuple):
  """scales: sides of the grids of codes; LlamaGen has one."""

  model: str
  batch: int
  vocab: int
  width: int
  layers: int
  heads: int
  mlp_width: int
  scales: tuple[int, ...]
  code_width: int = 0

  @property
  def tokens(self) -> int:
    return sum(n * n for n in self.scales)


SHAPES = {
  "llamagen": Shape("llamagen", 32, 4096, 384, 6, 6, 1024, (16,)),
  "llamagen digits": Shape("llamagen", 512, 64, 96, 4, 4, 256, (4,)),
  "var": Shape("var", 8, 4096, 384, 6, 6, 1536, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 32),
  "var digits": Shape("var", 512, 64, 96, 4, 4, 384, (1, 2, 4), 8),
}
CLASSES = 10
GUIDANCE = {"llamagen": (1.0, 2.0), "var": (0.0, 1.5)}  # none, some: each in its model's convention
EPS = {"llamagen": 1e-5, "var": 1e-6}
ROPE_BASE, PHIS, PHI_RATIO = 10_000.0, 4, 0.5
TURNS, TOLERANCE = 9, 1e-3  # of logits whose deviation is about 1


def labels_of(shape: Shape) -> np.ndarray:
  return np.arange(shape.batch, dtype=np.int32) % CLASSES


def codes_of(shape: Shape) -> np.ndarray:
  return np.random.default_rng(0).integers(shape.vocab, size=(shape.batch, shape.tokens), dtype=np.int32)


# Each implementation is (shape, weights or None) -> (weights or None, draw, logits):
# draw(guidance, seed) -> codes [batch, tokens]; logits(guidance, codes) -> guided logits [batch, tokens, vocab].


def reprise(shape: Shape, weights: None):
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  import jax

  from research import cpu
  from research.mesh import MeshConfig, make_mesh

  cpu.tune()  # as research.run does, and no sooner
  jax.set_mesh(make_mesh(MeshConfig()))
  return {"llamagen": _our_llamagen, "var": _our_var}[shape.model](shape)


def _our_llamagen(shape: Shape):
  import jax
  from jax import numpy as jnp

  from research.image_generation import llamagen_tokens
  from research.models.llamagen import LlamaGen, LlamaGenConfig

  cfg = LlamaGenConfig(
    vocab=shape.vocab, width=shape.width, layers=shape.layers, heads=shape.heads, kv_heads=shape.heads,
    head_dim=shape.width // shape.heads, mlp_width=shape.mlp_width, rope_base=ROPE_BASE, norm_eps=EPS["llamagen"],
    classes=CLASSES, tokens=shape.tokens, precision="float32",
  )  # fmt: skip
  model = _varied(jax.jit(functools.partial(LlamaGen, cfg=cfg))(jax.random.key(0)))
  labels = labels_of(shape)

  @jax.jit
  def logits(model, labels, codes):
    """From the cache, as in drawing."""

    def body(cache, token):
      x, cache = model.extend(token[:, None], cache)
      return cache, model.unembed(x)[:, 0]

    x, cache = model.begin(labels)
    _, rest = jax.lax.scan(body, cache, codes[:, :-1].T)
    return jnp.concatenate([model.unembed(x), jnp.swapaxes(rest, 0, 1)], axis=1)

  def guided(guidance, codes):
    cond, null = (np.asarray(logits(model, x, codes)) for x in (labels, np.full_like(labels, CLASSES)))
    return null + guidance * (cond - null)

  draw = lambda guidance, seed: llamagen_tokens(model, labels, guidance=guidance, seed=seed)
  return _named(model), draw, guided


def _our_var(shape: Shape):
  import jax

  from research.image_generation import var_tokens
  from research.models.var import VAR, VARConfig
  from research.models.vqvae import VQVAE, VQVAEConfig

  sizes = {"vocab": shape.vocab, "code_width": shape.code_width, "scales": shape.scales}
  cfg = VARConfig(
    **sizes, width=shape.width, layers=shape.layers, heads=shape.heads, mlp_width=shape.mlp_width,
    norm_eps=EPS["var"], classes=CLASSES, precision="float32",
  )  # fmt: skip
  book = VQVAEConfig(**sizes, latent=8, channels=32, mult=(1,), blocks=1, phis=PHIS, phi_ratio=PHI_RATIO)
  model = _varied(jax.jit(functools.partial(VAR, cfg=cfg))(jax.random.key(0)))
  tokenizer = jax.jit(functools.partial(VQVAE, cfg=book))(jax.random.key(1))
  tokenizer.codebook[...] = tokenizer.codebook[...] * shape.vocab  # of the size of 1, as when trained
  labels = labels_of(shape)
  logits = jax.jit(lambda model, tokenizer, codes, labels: model.logits(tokenizer.inputs(codes), labels))

  def guided(guidance, codes):
    both = labels, np.full_like(labels, CLASSES)
    cond, null = (np.asarray(logits(model, tokenizer, codes, x)) for x in both)
    t = (guidance * model.cfg.levels / (len(shape.scales) - 1))[:, None]
    return (1 + t) * cond - t * null

  draw = lambda guidance, seed: var_tokens(model, tokenizer, labels, guidance=guidance, seed=seed)
  kept = {"codebook": tokenizer.codebook, "phis": tokenizer.phis}
  return _named(model) | _named(kept), draw, guided


def _varied(model):
  """As if trained: nothing is zero, and the head's logits deviate by about 1."""
  import jax

  leaves, structure = jax.tree.flatten(model)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  noise = [0.05 * jax.random.normal(key, x.shape, out_sharding=x.sharding) for key, x in zip(keys, leaves, strict=True)]
  return jax.tree.map(lambda x, n: x + n, model, jax.tree.unflatten(structure, noise))


def _named(tree) -> dict[str, np.ndarray]:
  """Arrays under the names of their paths, such as "blocks.attention.qkv"."""
  import jax

  name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
  return {name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


def pytorch(shape: Shape, weights: dict):
  import torch

  from benchmarks import torch_images

  torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
  torch.set_grad_enabled(False)
  weights = {name: torch.tensor(x) for name, x in weights.items()}
  draw = {"llamagen": torch_images.llamagen, "var": torch_images.var}[shape.model](shape, weights)
  labels = torch.tensor(labels_of(shape)).long()

  def codes(guidance, seed):
    torch.manual_seed(seed)
    return draw(labels, guidance)[0].numpy()

  return None, codes, lambda guidance, given: draw(labels, guidance, torch.tensor(given).long())[1].numpy()


IMPLEMENTATIONS = {"reprise": reprise, "torch": pytorch}


def serve(pipe, name: str, shape: Shape, weights: dict | None) -> None:
  """A worker: sends its weights, then answers (function, guidance, argument) with (result, seconds), until None."""
  weights, *functions = IMPLEMENTATIONS[name](shape, weights)
  functions = dict(zip(("draw", "logits"), functions, strict=True))
  pipe.send(weights)
  while (asked := pipe.recv()) is not None:
    function, *arguments = asked
    start = time.perf_counter()
    result = functions[function](*arguments)  # on the host: nothing is under way any more
    pipe.send((result, time.perf_counter() - start))


def measure(label: str, shape: Shape) -> list[dict]:
  """The rows of the record for one model."""
  context = multiprocessing.get_context("spawn")
  names = [name for name in IMPLEMENTATIONS if name == "reprise" or importlib.util.find_spec("torch")]
  pipes, workers, weights = {}, [], None
  for name in names:
    pipes[name], theirs = context.Pipe()
    workers.append(context.Process(target=serve, args=(theirs, name, shape, weights), daemon=True))
    workers[-1].start()
    theirs.close()  # so that a worker's death ends the wait for it
    weights = pipes[name].recv() or weights

  def ask(name, *what):
    pipes[name].send(what)
    return pipes[name].recv()

  plain, some = GUIDANCE[shape.model]
  logits = {name: ask(name, "logits", some, codes_of(shape))[0] for name in names}
  apart = max(float(np.abs(x - logits["reprise"]).max()) for x in logits.values())
  if not apart < TOLERANCE:
    raise SystemExit(f"{label}: logits differ by {apart:.2g}: torch draws from another model")
  seconds: dict[tuple[str, float], list[float]] = {(name, scale): [] for name in names for scale in (plain, some)}
  for turn in range(TURNS + 1):  # taking turns: noise of the machine meets all; the first compiles and warms up
    for name, scale in list(seconds)[:: 1 if turn % 2 else -1]:
      time.sleep(0.3)  # idle OpenMP threads spin for a while
      codes, spent = ask(name, "draw", scale, turn)
      check_codes(codes, shape)
      if turn:
        seconds[name, scale].append(spent)
  for pipe, worker in zip(pipes.values(), workers, strict=True):
    pipe.send(None)
    worker.join()
  median = {which: statistics.median(spent) for which, spent in seconds.items()}
  tokens = shape.batch * shape.tokens
  return [
    {
      "shape": label,
      **shape._asdict(),
      "implementation": name,
      "guidance": scale,
      "seconds": median[name, scale],
      "min_seconds": min(seconds[name, scale]),
      "max_seconds": max(seconds[name, scale]),
      "tokens_per_second": tokens / median[name, scale],
      "over_no_guidance": median[name, scale] / median[name, plain],
      # Of the least times: what else runs on the machine only adds, and to torch's barriers most.
      "ours_over_this": min(seconds["reprise", scale]) / min(seconds[name, scale]),
      "logits_std": float(logits["reprise"].std()),
      "logits_differ_by": apart if len(names) > 1 else None,
      "torch": importlib.metadata.version("torch") if len(names) > 1 else None,
    }
    for name, scale in seconds
  ]


def check_codes(codes: np.ndarray, shape: Shape) -> None:
  assert codes.shape == (shape.batch, shape.tokens)
  assert codes.min() >= 0
  assert codes.max() < shape.vocab


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", help="write the rows and the machine as JSON")
  parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES), help="only these")
  args = parser.parse_args()
  if not importlib.util.find_spec("torch"):
    print("torch is not installed (the extra `bench`): only ours is measured")
  print(f"thousand tokens a second: of the median (least to most) of {TURNS} turns; its time over that without")
  print("guidance; our least time over the least of each")
  rows = []
  for label in args.shape:
    shape = SHAPES[label]
    print(f"{label}: {shape.batch} x {shape.tokens} tokens")
    for row in measure(label, shape):
      rows.append(row)
      rate = lambda seconds: shape.batch * shape.tokens / seconds / 1e3
      spread = f"({rate(row['max_seconds']):.2f} to {rate(row['min_seconds']):.2f})"
      print(
        f"  {row['implementation']:8} guidance {row['guidance']}  {rate(row['seconds']):7.2f} {spread:18}"
        f" {row['over_no_guidance']:.2f}  {row['ours_over_this']:.2f}",
        flush=True,
      )
  if args.out:
    record.write(args.out, "image_sampling", rows)


if __name__ == "__main__":
  main()
