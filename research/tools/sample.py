"""Images from a model: `python -m research.tools.sample --weights=c2i.pt --tokenizer=vq.pt --out=FILE.npz`.

The model and its tokenizer are published weights or workdirs of ours. Writes uint8 `arr_0`
[n, size, size, channels], as the usual evaluators read it, beside `labels`, `codes` and the settings as JSON; `--grid`
adds a PNG. Scales of guidance are those of the papers on it: logits (1 + s) class - s null, 0 for none. That is
1 + s in LlamaGen's released code; VAR's grows from 0 at the first scale to s at the last.
"""

import argparse
import json
import sys
from typing import Any

import jax
import numpy as np

from research import cpu, image_generation, image_tokenizers, report, run, runs
from research.data.images import square
from research.errors import UserError, check
from research.generation import Sampling
from research.mesh import to_devices
from research.models import convert
from research.models.llamagen import LlamaGen
from research.models.var import VAR
from research.tools import models
from research.tools.logits import save

# what tells a model from another one of its kind
_SIZES = ("layers", "heads", "width", "mlp_width", "vocab", "classes")


def main() -> None:
  cpu.tune()
  args, overrides = parse(sys.argv[1:])
  sampling = models.sampling(args)
  run.compilation_cache()
  with runs.mesh(overrides):
    model, about = open_model(args, overrides)
    scales = list(model.cfg.scales) if isinstance(model, VAR) else None
    tokenizer = image_tokenizers.load(args.tokenizer, args.tokenizer_run, scales)
    labels = choose_labels(args, model.cfg.classes)
    check_pair(model, tokenizer)
    codes, images = draw(model, tokenizer, labels, args.scale, sampling, args.seed, args.batch)
  size = args.size or images.shape[1]
  pixels = np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
  pixels = np.stack([square(x, size, x.shape[-1]) for x in pixels]) if size != images.shape[1] else pixels
  about |= {"backbone": "llamagen" if isinstance(model, LlamaGen) else "var", "tokenizer": args.tokenizer}
  about |= {name: getattr(args, name) for name in ("scale", "temperature", "top_k", "top_p", "seed", "labels")}
  about["sizes"] = {name: getattr(model.cfg, name) for name in _SIZES}
  about |= {"samples": len(labels), "size": size, "generated_size": images.shape[1]}
  save(args.out, arr_0=pixels, labels=labels, codes=codes, settings=np.array(json.dumps(about)))
  if args.grid:
    shown = images[: args.grid_images]
    report.image_grid(args.grid, shown, columns=args.columns, scale=max(64 // shown.shape[1], 1))
  print(f"{len(labels)} images of {size} x {size} -> {args.out}{f', {args.grid}' if args.grid else ''}")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """(command line, overrides of a workdir's config). Raises UserError."""
  parser = run.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  which = parser.add_mutually_exclusive_group(required=True)
  which.add_argument("--workdir", metavar="DIR", help="of a run; --config.NAME=VALUE changes how its model is executed")
  which.add_argument("--weights", metavar="PATH", help="published weights: a directory, or a file")
  parser.add_argument("--run", metavar="ARM-SEED", help="which of the workdir's runs, if it has several")
  parser.add_argument("--tokens", type=int, help="of an image, where LlamaGen's weights do not say: 256 or 576")
  parser.add_argument("--tokenizer", required=True, metavar="PATH", help="published weights, or a workdir")
  parser.add_argument("--tokenizer_run", metavar="ARM-SEED", help="which of that workdir's runs")
  parser.add_argument("--out", required=True, metavar="FILE.npz")
  parser.add_argument("--labels", default="random", help="random, even (as many of each class), or numbers: 1,1,207")
  parser.add_argument("--samples", type=int, default=64, metavar="N", help="of random or even labels (default: 64)")
  parser.add_argument("--scale", type=float, default=0.0, metavar="S", help="of guidance; 0: none (default)")
  models.add_sampling(parser)
  parser.add_argument("--batch", type=int, default=64, help="images at once (default: 64)")
  parser.add_argument("--size", type=int, help="pixels a side to resize to (default: as generated)")
  parser.add_argument("--grid", metavar="FILE.png", help="a picture of the first images, row by row")
  parser.add_argument("--grid_images", type=int, default=64, metavar="N", help="how many (default: 64)")
  parser.add_argument("--columns", type=int, default=8, metavar="N", help="of the grid (default: 8)")
  args, overrides = parser.parse_with_overrides(argv)
  for name in ("samples", "batch", "grid_images", "columns"):
    check(getattr(args, name) >= 1, name, getattr(args, name), "use a positive number")
  check(args.size is None or args.size >= 1, "size", args.size, "use a positive number")
  check(args.scale >= 0, "scale", args.scale, "use 0 (no guidance) or more")
  return args, overrides


def open_model(args: argparse.Namespace, overrides: list[str]) -> tuple[LlamaGen | VAR, dict[str, Any]]:
  """(the model on the current mesh, where it is from). Raises UserError."""
  if args.workdir is not None:
    name, _ = runs.find(args.workdir, args.run)
    model, path = runs.load(args.workdir, name, overrides)[1], args.workdir
  else:
    check(args.run is None, "run", args.run, "goes with --workdir")
    settings = {"block_size": args.tokens} if args.tokens else None
    (_, model), name, path = convert.load(convert.read(args.weights, settings)), None, args.weights
  fix = f"is a {type(model).__name__}: give a model that writes images, a LlamaGen or a VAR"
  check(isinstance(model, LlamaGen | VAR), "workdir" if name else "weights", path, fix)
  return model, {"model": str(path), "run": name}


def check_pair(model: LlamaGen | VAR, tokenizer: Any) -> None:
  """Raises UserError unless `tokenizer` has the codes that `model` writes."""
  if isinstance(model, VAR):
    fix = f"is a {type(tokenizer).__name__}; VAR writes codes of a VQVAE"
    check(hasattr(tokenizer.cfg, "scales"), "tokenizer", type(tokenizer).__name__, fix)
    image_generation.check_tokenizer(model, tokenizer)
  else:
    check(not hasattr(tokenizer.cfg, "scales"), "tokenizer", type(tokenizer).__name__, "LlamaGen writes codes of a VQ")
    vocab = tokenizer.cfg.vocab
    check(vocab == model.cfg.vocab, "tokenizer.vocab", vocab, f"must be the model's, {model.cfg.vocab}")


def choose_labels(args: argparse.Namespace, classes: int) -> np.ndarray:
  """int32 [n]. Raises UserError."""
  if args.labels == "random":
    return np.random.default_rng(args.seed).integers(0, classes, args.samples, dtype=np.int32)
  if args.labels == "even":
    fix = f"must be a multiple of the {classes} classes for even labels"
    check(args.samples % classes == 0, "samples", args.samples, fix)
    return np.repeat(np.arange(classes, dtype=np.int32), args.samples // classes)
  try:
    labels = np.array([int(n) for n in args.labels.split(",")], np.int32)
  except ValueError:
    raise UserError("labels", args.labels, "use random, even, or numbers with commas between: 1,1,207") from None
  image_generation.check_labels(labels, classes)
  return labels


def draw(model, tokenizer, labels: np.ndarray, scale: float, sampling: Sampling, seed: int, batch: int):
  """(codes int32 [n, tokens], images float32 [n, size, size, channels] in [-1, 1]), `batch` at a time."""
  parts = []
  for at in range(0, len(labels), batch):
    rows = labels[at : at + batch]
    filled = np.concatenate([rows, np.repeat(rows[:1], batch - len(rows))])
    part_seed = int(np.random.SeedSequence([seed, at]).generate_state(1)[0] >> 1)
    if isinstance(model, VAR):
      made = image_generation.var_images(model, tokenizer, filled, guidance=scale, sampling=sampling, seed=part_seed)
    else:
      codes = image_generation.llamagen_tokens(model, filled, guidance=1 + scale, sampling=sampling, seed=part_seed)
      made = codes, jax.device_get(image_tokenizers.decode(tokenizer, to_devices({"x": codes})["x"]))
    parts.append([x[: len(rows)] for x in made])
  return tuple(np.concatenate(x) for x in zip(*parts, strict=True))


if __name__ == "__main__":
  run.guard(main)
