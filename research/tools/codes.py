"""Codes of images as shards: `python -m research.tools.codes --source=folder:DIR --tokenizer=PATH --size=8 --out=DIR`.

The source is any that docs/data.md names for images; the tokenizer one of published weights (LlamaGen's or VAR's), or
of a workdir. Every image is encoded once, in all of its views. When interrupted, even by SIGKILL, the same
command goes on after the last whole shard and ends with the same files, byte for byte.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
import json
import os
import pathlib
import sys

import jax
import numpy as np
from tqdm import tqdm

from research import cpu, image_tokenizers, paths, run
from research import mesh as meshes
from research.data import codes, images, shards
from research.data.images import ImageConfig
from research.errors import UserError, check
from research.mesh import to_devices
from research.tools import writing

# by name, which of `images.ten_crops` an image is encoded in; validation images in the first alone
VIEWS = {"centre": (4,), "mirrored": (4, 9), "five": (4, 0, 1, 2, 3), "ten": (4, 0, 1, 2, 3, 9, 5, 6, 7, 8)}


def main() -> None:
  cpu.tune()
  args = parse(sys.argv[1:])
  root = pathlib.Path(args.out).expanduser()
  run.compilation_cache()
  with jax.set_mesh(meshes.make_mesh(meshes.MeshConfig(partition="replicated"), jax.devices())):
    tokenizer = image_tokenizers.load(args.tokenizer, args.tokenizer_run, args.scales)
    cfg = ImageConfig(
      source=args.source,
      size=args.size,
      channels=tokenizer.cfg.image_channels,
      resize=args.resize,
      max_bad_records=args.max_bad_records,
    )
    image_tokenizers.tokens(tokenizer, cfg.size)
    data = images.load(cfg)  # what is wrong with the source is told before anything is written
    with writing.alone(root):
      write(data, tokenizer, root, args)


def parse(argv: list[str]) -> argparse.Namespace:
  """The command line. Raises UserError."""
  parser = run.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--source", required=True, help="digits, folder:DIR, tar:DIR or tfds:NAME, see docs/data.md")
  parser.add_argument("--tokenizer", required=True, metavar="PATH", help="published weights, or a workdir")
  parser.add_argument("--tokenizer_run", metavar="ARM-SEED", help="which of the workdir's runs, if it has several")
  parser.add_argument("--scales", type=_sides, help="of VAR's tokenizer, where its weights do not say: 1,2,3,4")
  parser.add_argument("--out", required=True, metavar="DIR", help="where the shards and manifest.json go")
  parser.add_argument("--size", type=int, required=True, help="pixels a side of what is encoded")
  parser.add_argument("--resize", type=float, default=1.0, help="the shorter side becomes this times size (default: 1)")
  parser.add_argument("--views", choices=VIEWS, default="centre", help="of training images (default: centre)")
  parser.add_argument("--batch", type=int, default=64, help="views encoded at once on each device (default: 64)")
  parser.add_argument("--shard_images", type=int, default=16384, help="images in a shard (default: 16384)")
  parser.add_argument("--max_bad_records", type=int, default=ImageConfig.max_bad_records, help="skipped and named")
  args = parser.parse_args(argv)
  for name in ("batch", "shard_images"):
    check(getattr(args, name) >= 1, name, getattr(args, name), "use a positive number")
  return args


def _sides(text: str) -> tuple[int, ...]:
  return tuple(int(n) for n in text.split(","))


def write(data: images.ImageData, tokenizer, root: pathlib.Path, args: argparse.Namespace) -> None:
  """Writes or goes on writing the codes of `data` into `root`, and says what they are."""
  path, cfg, about_tokenizer = root / shards.MANIFEST, data.cfg, image_tokenizers.identity(tokenizer)
  settings = {name: getattr(cfg, name) for name in ("source", "size", "channels", "resize")}
  settings |= {"views": args.views, "shard_images": args.shard_images, "tokenizer": about_tokenizer["sha256"][:12]}
  settings |= {f"{split}_names": sha256[:12] for split, sha256 in data.info()["sha256"].items()}
  if path.exists():
    about = writing.begun(root, settings, codes.FORMAT)
  else:
    about = {"format": codes.FORMAT, "complete": False, "settings": settings, "tokenizer": about_tokenizer}
    about |= {"tokens": image_tokenizers.tokens(tokenizer, cfg.size), "classes": list(data.classes)}
    about["splits"] = codes.empty({"train": len(VIEWS[args.views]), "validation": 1})
  save = lambda: paths.write(path, json.dumps(about, indent=1) + "\n")
  if not about["complete"]:
    save()
    for split, entry in about["splits"].items():
      _write_split(data.splits[split], split, entry, tokenizer, root, args, cfg.size, save)
    about["complete"] = True
    save()
  for split, entry in about["splits"].items():
    bad = entry["bad_records"]
    told = f"; {len(bad)} cannot be read: {', '.join(bad)}" if bad else ""
    print(f"{split}: {entry['images']:,} images in {entry['views']} views of {about['tokens']} codes{told}")
  print(f"train on them with --config.codes.source=codes:{root}")


def _write_split(source: images.Images, split: str, entry: dict, tokenizer, root, args, size: int, save) -> None:
  """Encodes what lies behind the entry's cursor."""
  source.bad.update(dict.fromkeys(entry["bad_records"], "was met before"))

  def on_shard():
    entry["bad_records"] = sorted(source.bad)
    save()

  writer = codes.Writer(root, split, tokenizer.cfg.vocab, args.shard_images, entry, on_shard)
  views = VIEWS[args.views][: entry["views"]]
  at_once = max(args.batch * jax.device_count() // len(views), 1)
  # disable=None: shown to people only, on a terminal
  with (
    ThreadPoolExecutor(os.cpu_count()) as pool,
    tqdm(desc=f"{split}, encoded", total=len(source), initial=entry["cursor"], unit="image", disable=None) as bar,
  ):
    waiting = None
    for chunk in _chunks(source, entry["cursor"], size, views, at_once, pool):
      # encoded while the next images are read, written after that
      made = image_tokenizers.encode_pixels(tokenizer, to_devices({"x": chunk[2]})["x"])
      _add(writer, waiting, len(views), bar)
      waiting = (*chunk[:2], made)
    _add(writer, waiting, len(views), bar)
  if not entry["images"] and writer.pending == 0:
    raise UserError("source", args.source, f"no image for {split} can be read")
  writer.finish(len(source))
  entry["bad_records"] = sorted(source.bad)


def _chunks(source: images.Images, start: int, size: int, views: tuple[int, ...], n: int, pool) -> Iterator[tuple]:
  """(items, labels, pixels uint8 [rows, size, size, channels]) of n items at a time, less those that cannot be read.

  The rows, an image's views beside each other, are filled up to one number: it is one program.
  """
  rows = -(-n * len(views) // jax.device_count()) * jax.device_count()

  def read(i):
    row = source.read(i)
    return None if row is None else (i, row["labels"], images.ten_crops(row["images"], size)[list(views)])

  for at in range(start, len(source), n):
    found = [row for row in pool.map(read, range(at, min(at + n, len(source)))) if row is not None]
    if found:
      items, labels, pixels = zip(*found, strict=True)
      pixels = np.concatenate(pixels)
      yield items, labels, np.concatenate([pixels, np.repeat(pixels[:1], rows - len(pixels), axis=0)])


def _add(writer: codes.Writer, waiting: tuple | None, views: int, bar: tqdm) -> None:
  if waiting is not None:
    items, labels, made = waiting
    made = jax.device_get(made)
    for n, (item, label) in enumerate(zip(items, labels, strict=True)):
      writer.add(item, made[n * views : (n + 1) * views], label)
      bar.update(item + 1 - bar.n)


if __name__ == "__main__":
  run.guard(main)
