"""The logits of published weights: `python -m research.tools.logits --weights=DIR --tokens=FILE.npz --out=FILE.npz`.

For checking parity with anybody's code from outside. `tokens` [batch, length] of the
input, whole numbers, gives float32 `logits` [batch, length, vocab] of the output; each
row is one document from position 0. Models of images need the array `labels` [batch], too: of their
tokens, the logits are those that predict them. VAR also needs its tokenizer, which says
what it reads for the tokens. Computed in float32 on one device.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import sys
import zipfile

import jax
import numpy as np

from research import mesh as meshes
from research import run
from research.errors import UserError, check, check_range, one_line
from research.image_generation import check_tokenizer
from research.models import convert
from research.models.llamagen import LlamaGen
from research.models.var import VAR
from research.models.vq import VQ
from research.models.vqvae import VQVAE

_BYTES = 2**28  # of logits computed at a time


def main() -> None:
  args = parse(sys.argv[1:])
  tokens = read_array(args.tokens, "tokens", 2)
  with jax.set_mesh(meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:1])):
    weights = convert.read(args.weights)
    chooses = "attention_kernel" in {field.name for field in dataclasses.fields(weights.family.Config)}
    cfg, model = convert.load(weights, precision="float32", **{"attention_kernel": "xla"} if chooses else {})
    says = not isinstance(model, VQ | VQVAE)
    check(says, "weights", args.weights, f"is a {weights.family.name}: a tokenizer has no logits")
    if isinstance(model, LlamaGen | VAR):
      labels = read_array(args.tokens, "labels", 1)
      out = image_logits(model, tokens, labels, read_tokenizer(args.tokenizer, model))
    else:
      out = logits(model, cfg.vocab, tokens)
    save(args.out, logits=out)


def parse(argv: list[str]) -> argparse.Namespace:
  parser = run.Parser(prog="python -m research.tools.logits", description=__doc__.split(":")[0])
  parser.add_argument("--weights", required=True, metavar="DIR", help="config.json and safetensors files, or a file")
  parser.add_argument("--tokens", required=True, metavar="FILE.npz", help="with `tokens` [batch, length], and `labels`")
  parser.add_argument("--tokenizer", metavar="DIR", help="of VAR: its tokenizer's weights")
  parser.add_argument("--out", required=True, metavar="FILE.npz", help="gets float32 `logits` [batch, length, vocab]")
  return parser.parse_args(argv)


def read_array(path: str, name: str, ndim: int) -> np.ndarray:
  """The whole numbers `name` of an .npz file, [batch, length] or [batch]. Raises UserError."""
  try:
    file = np.load(path, allow_pickle=False)
    single = isinstance(file, np.ndarray)
    check(not single, "tokens", path, "is a single array; write it with numpy.savez(path, tokens=...)")
    with file:
      check(name in file.files, "tokens", path, f"has no array `{name}`; it has {', '.join(file.files) or 'none'}")
      array = file[name]
  except OSError as e:
    raise UserError("tokens", path, f"cannot be read: {e.strerror or e}") from None
  except (ValueError, EOFError, zipfile.BadZipFile) as e:
    raise UserError("tokens", path, f"is no sound .npz file: {one_line(e)}") from None
  check(np.issubdtype(array.dtype, np.integer), name, f"{path} {array.dtype}", "must be whole numbers")
  shape = "[batch, length]" if ndim == 2 else "[batch]"
  ok = array.ndim == ndim and array.size > 0
  check(ok, name, f"{path} {list(array.shape)}", f"must be {shape}, not empty")
  return array


def read_tokenizer(path: str | None, model: LlamaGen | VAR) -> VQVAE | None:
  """The tokenizer that says what a VAR reads; None for other models. Raises UserError."""
  if not isinstance(model, VAR):
    check(path is None, "tokenizer", path, "only VAR needs it here")
    return None
  check(path is not None, "tokenizer", "none", "give that of VAR: --tokenizer=DIR")
  weights = convert.read(path, {"v_patch_nums": list(model.cfg.scales)})
  check(weights.family.make is VQVAE, "tokenizer", path, f"is a {weights.family.name}; give that of VAR")
  _, tokenizer = convert.load(weights, precision="float32")
  check_tokenizer(model, tokenizer)
  return tokenizer


def logits(model, vocab: int, tokens: np.ndarray) -> np.ndarray:
  """float32 [batch, length, vocab] of the model at whole-number `tokens` [batch, length]. Raises UserError."""
  check_range("tokens", tokens, vocab)

  def f(model, tokens):
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return model.logits(tokens, np.ones_like(positions), positions)

  return _in_parts(f, model, vocab, tokens)


def image_logits(
  model: LlamaGen | VAR, tokens: np.ndarray, labels: np.ndarray, tokenizer: VQVAE | None = None
) -> np.ndarray:
  """float32 [batch, length, vocab] that predict the tokens [batch, length] of images of `labels` [batch].

  tokenizer: of VAR, which needs all tokens of an image. Raises UserError.
  """
  cfg = model.cfg
  check_range("tokens", tokens, cfg.vocab)
  check_range("labels", labels, cfg.classes + 1)
  check(len(labels) == len(tokens), "labels", len(labels), f"must be one for each of the {len(tokens)} rows of tokens")
  length, whole = tokens.shape[1], tokenizer is not None
  fits = length == cfg.tokens if whole else length <= cfg.tokens
  check(fits, "tokens", length, f"an image has {cfg.tokens}")

  def f(models, tokens, labels):
    model, tokenizer = models
    return model.logits(tokens if tokenizer is None else tokenizer.inputs(tokens), labels)

  return _in_parts(f, (model, tokenizer), cfg.vocab, tokens, labels)


def _in_parts(f, model, vocab: int, *arrays: np.ndarray) -> np.ndarray:
  """f(model, *rows of arrays), as many rows at a time as memory is meant for."""
  batch, length = arrays[0].shape
  rows = max(1, min(batch, _BYTES // (4 * length * vocab)))
  f = jax.jit(f)
  out = np.empty((batch, length, vocab), np.float32)
  with jax.default_matmul_precision("highest"):  # float32 products elsewhere than on a CPU, too
    for start in range(0, batch, rows):
      parts = [x[start : start + rows].astype(np.int32) for x in arrays]
      n = len(parts[0])
      parts = [np.concatenate([x, np.zeros((rows - n, *x.shape[1:]), np.int32)]) for x in parts]
      out[start : start + rows] = jax.device_get(f(model, *parts))[:n]
  return out


def save(path: str, **arrays: np.ndarray) -> None:
  """Writes an .npz of the arrays, whole or not at all. Raises UserError."""
  out = pathlib.Path(path)
  check(not out.is_dir(), "out", path, "is a directory; name a file")
  partial = out.absolute().with_name(f".{out.name}.{os.getpid()}.partial")
  try:
    with partial.open("wb") as file:
      np.savez(file, **arrays)
    partial.replace(out)
  except OSError as e:
    raise UserError("out", path, f"cannot be written: {e.strerror or e}") from None
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()


if __name__ == "__main__":
  run.guard(main)
