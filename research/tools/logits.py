"""The logits of published weights: `python -m research.tools.logits --weights=DIR --tokens=FILE.npz --out=FILE.npz`.

For checking parity with anybody's code from outside. `tokens` [batch, length] of the
input, whole numbers, gives float32 `logits` [batch, length, vocab] of the output; each
row is one document from position 0. Computed in float32 on one device.
"""

import argparse
import contextlib
import os
import pathlib
import sys
import zipfile

import jax
import numpy as np

from research import mesh as meshes
from research import run
from research.errors import UserError, check
from research.models import convert

_BYTES = 2**28  # of logits computed at a time


def main() -> None:
  args = parse(sys.argv[1:])
  tokens = read_tokens(args.tokens)
  with jax.set_mesh(meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:1])):
    cfg, model = convert.load(args.weights, precision="float32", attention_kernel="xla")
    save(args.out, logits(model, cfg.vocab, tokens))


def parse(argv: list[str]) -> argparse.Namespace:
  parser = run.Parser(prog="python -m research.tools.logits", description=__doc__.split(":")[0])
  parser.add_argument("--weights", required=True, metavar="DIR", help="config.json and safetensors files")
  parser.add_argument("--tokens", required=True, metavar="FILE.npz", help="with an array `tokens` [batch, length]")
  parser.add_argument("--out", required=True, metavar="FILE.npz", help="gets float32 `logits` [batch, length, vocab]")
  return parser.parse_args(argv)


def read_tokens(path: str) -> np.ndarray:
  """The array `tokens` of an .npz file. Raises UserError."""
  try:
    file = np.load(path, allow_pickle=False)
    single = isinstance(file, np.ndarray)
    check(not single, "tokens", path, "is a single array; write it with numpy.savez(path, tokens=...)")
    with file:
      check("tokens" in file.files, "tokens", path, f"has no array `tokens`; it has {', '.join(file.files) or 'none'}")
      tokens = file["tokens"]
  except OSError as e:
    raise UserError("tokens", path, f"cannot be read: {e.strerror or e}") from None
  except (ValueError, EOFError, zipfile.BadZipFile) as e:
    raise UserError("tokens", path, f"is no sound .npz file: {' '.join(str(e).split())}") from None
  check(np.issubdtype(tokens.dtype, np.integer), "tokens", f"{path} {tokens.dtype}", "must be whole numbers")
  check(
    tokens.ndim == 2 and tokens.size > 0, "tokens", f"{path} {list(tokens.shape)}", "must be [batch, length], not empty"
  )
  return tokens


def logits(model, vocab: int, tokens: np.ndarray) -> np.ndarray:
  """float32 [batch, length, vocab] of the model at whole-number `tokens` [batch, length]. Raises UserError."""
  low, high = tokens.min(), tokens.max()
  check(low >= 0 and high < vocab, "tokens", int(low if low < 0 else high), f"must lie in 0 .. {vocab - 1}")
  batch, length = tokens.shape
  rows = max(1, min(batch, _BYTES // (4 * length * vocab)))
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
  f = jax.jit(lambda model, tokens: model.logits(tokens, np.ones_like(positions), positions))
  out = np.empty((batch, length, vocab), np.float32)
  with jax.default_matmul_precision("highest"):  # float32 products elsewhere than on a CPU, too
    for start in range(0, batch, rows):
      part = tokens[start : start + rows].astype(np.int32)
      full = np.concatenate([part, np.zeros((rows - len(part), length), np.int32)])
      out[start : start + rows] = jax.device_get(f(model, full))[: len(part)]
  return out


def save(path: str, logits: np.ndarray) -> None:
  """Writes an .npz of `logits`, whole or not at all. Raises UserError."""
  out = pathlib.Path(path)
  check(not out.is_dir(), "out", path, "is a directory; name a file")
  partial = out.absolute().with_name(f".{out.name}.{os.getpid()}.partial")
  try:
    with partial.open("wb") as file:
      np.savez(file, logits=logits)
    partial.replace(out)
  except OSError as e:
    raise UserError("out", path, f"cannot be written: {e.strerror or e}") from None
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()


if __name__ == "__main__":
  run.guard(main)
