"""Samples against real images: `python -m research.tools.frechet --samples=S.npz --reference=R.npz --features=M:NAME`.

M:NAME is your module and its function: uint8 images [n, height, width, channels] -> float features [n, d]. Files may
also hold `features` [n, d] that you have computed, and a reference `mu` [d] and `sigma` [d, d], as published
statistics do; images are `arr_0`. With Inception's features (yours: its weights come with nothing here) the distance is
an FID, and called so where `--inception` says whose Inception it is; with any other it is a Fréchet distance of
those features alone.
"""

import argparse
from collections.abc import Callable
import hashlib
import importlib
import json
import pathlib
import sys
import zipfile

import numpy as np

from research import run
from research.errors import UserError, check, one_line
from research.evals.images import frechet_of_gaussians, gaussian

_BATCH = 64


def main() -> None:
  parser = run.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--samples", required=True, metavar="FILE.npz", help="arr_0 (images) or features")
  parser.add_argument("--reference", required=True, metavar="FILE.npz", help="arr_0, features, or mu and sigma")
  parser.add_argument("--features", metavar="MODULE:NAME", help="the function that makes features of images")
  parser.add_argument("--inception", metavar="WHICH", help="features are Inception's, of these weights and this layer")
  parser.add_argument("--out", metavar="FILE.json", help="where the result goes beside the terminal")
  args = parser.parse_args(sys.argv[1:])
  f = function(args.features) if args.features else None
  samples, n = statistics("samples", args.samples, f)
  reference, _ = statistics("reference", args.reference, f)
  told = {"measure": "FID" if args.inception else "Fréchet distance of features"}
  told |= {"value": frechet_of_gaussians(*samples, *reference), "samples": n, "width": len(samples[0])}
  told |= {"features": args.inception or args.features or "as given", "reference": args.reference}
  told["reference_sha256"] = hashlib.sha256(pathlib.Path(args.reference).read_bytes()).hexdigest()
  text = json.dumps(told, indent=1, ensure_ascii=False)
  print(text)
  if args.out:
    pathlib.Path(args.out).write_text(text + "\n")


def function(name: str) -> Callable[[np.ndarray], np.ndarray]:
  """The function MODULE:NAME. Raises UserError."""
  module, _, attribute = name.partition(":")
  try:
    found = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError, ValueError) as e:
    raise UserError("features", name, f"cannot be imported: {e}; write MODULE:NAME") from None
  check(callable(found), "features", name, "is no function")
  return found


def statistics(field: str, path: str, f: Callable | None) -> tuple[tuple[np.ndarray, np.ndarray], int | None]:
  """((mean [d], covariance [d, d]), rows or None where it is not said) of a file. Raises UserError."""
  try:
    with np.load(path, allow_pickle=False) as file:
      held = {name: file[name] for name in ("mu", "sigma", "features", "arr_0") if name in file.files}
  except (OSError, ValueError, AttributeError, EOFError, zipfile.BadZipFile) as e:
    raise UserError(field, path, f"is no sound .npz file: {one_line(e)}") from None
  if {"mu", "sigma"} <= held.keys():
    mean, covariance = (held[name].astype(np.float64) for name in ("mu", "sigma"))
    fits = mean.ndim == 1 and covariance.shape == 2 * mean.shape
    check(fits, field, path, f"mu and sigma must be [d] and [d, d], not {mean.shape} and {covariance.shape}")
    return (mean, covariance), None
  if "features" not in held:
    check("arr_0" in held, field, path, "holds none of arr_0 (images), features, mu and sigma")
    check(f is not None, "features", "not given", f"{path} holds images: name the function that makes features of them")
    images = held["arr_0"]
    held["features"] = np.concatenate([np.asarray(f(images[i : i + _BATCH])) for i in range(0, len(images), _BATCH)])
  return gaussian(held["features"]), len(held["features"])


if __name__ == "__main__":
  run.guard(main)
