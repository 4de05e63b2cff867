"""In what a run, or samples, differ from a row of the paper: `python -m experiments.cca.protocol --row=llamagen_l-cca`.

  --samples=FILE.npz  what research.tools.sample wrote; of a workdir's run also how it was tuned
  --measured=FILE.json  what research.tools.frechet said of them
  --workdir=DIR  how a run was tuned

The rows are `protocols/*.json`. What the paper and its code do not tell is "unknown" there, and never counts as equal.
"""

import argparse
from collections.abc import Mapping
import json
import pathlib
import sys
from typing import Any

import numpy as np

from research import config, run, runs
from research.errors import UserError, check, one_line
from research.markdown import table
from research.models import llamagen, var

FOLDER = pathlib.Path(__file__).parent / "protocols"
UNKNOWN = "unknown"
IMAGES = 1_281_167  # of ImageNet's training split


def main() -> None:
  parser = run.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--row", required=True, choices=names(), metavar="NAME", help=f"one of {', '.join(names())}")
  parser.add_argument("--samples", metavar="FILE.npz", help="of research.tools.sample")
  parser.add_argument("--measured", metavar="FILE.json", help="of research.tools.frechet")
  parser.add_argument("--workdir", metavar="DIR", help="of a run")
  parser.add_argument("--run", metavar="ARM-SEED", help="which of the workdir's runs, if it has several")
  args = parser.parse_args(sys.argv[1:])
  row, here = read(args.row), {}
  if args.samples:
    here |= of_samples(args.samples)
  if args.measured:
    here |= of_measurement(args.measured)
  if args.workdir:
    here |= of_run(runs.find(args.workdir, args.run)[1])
  print(f"{args.row}: {row['source']}; published {', '.join(f'{k} {v}' for k, v in row['published'].items())}")
  for note in row.get("notes", ()):
    print(f"  {note}")
  differ, unknown, absent = compare(row, here)
  if here:
    print(f"\n{table(['setting', 'published', 'here'], differ)}" if differ else "\nnothing that is known differs")
  print(f"\nnot known of the published row: {', '.join(unknown) or 'nothing'}")
  print(f"not told of what is compared: {', '.join(absent) or 'nothing'}")


def names() -> list[str]:
  """Of the rows."""
  return sorted(path.stem for path in FOLDER.glob("*.json"))


def read(name: str) -> dict[str, Any]:
  """A row's protocol."""
  return json.loads((FOLDER / f"{name}.json").read_text())


def settings(row: Mapping[str, Any]) -> dict[str, Any]:
  """{dotted name: value} of all that a row says of how its numbers came about."""
  found = {name: row[name] for name in ("backbone", "size")}
  for group in ("tuning", "sampling", "evaluation"):
    found |= {f"{group}.{name}": value for name, value in (row[group] or {"method": "none"}).items()}
  return found


def compare(row: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[list[tuple], list[str], list[str]]:
  """([setting, published, here] that differ, settings unknown of the row, settings unknown of `here`)."""
  wanted = settings(row)
  known = {name: value for name, value in wanted.items() if value != UNKNOWN}
  differ = [(name, value, here[name]) for name, value in known.items() if name in here and here[name] != value]
  return differ, [name for name in wanted if name not in known], [name for name in known if name not in here]


def of_samples(path: str) -> dict[str, Any]:
  """What an .npz of samples says of itself. Raises UserError."""
  try:
    with np.load(path, allow_pickle=False) as file:
      told, count = json.loads(str(file["settings"])), len(file["labels"])
  except (OSError, ValueError, KeyError, EOFError) as e:
    raise UserError("samples", path, f"is no file of research.tools.sample: {one_line(e)}") from None
  names = ("scale", "temperature", "top_k", "top_p", "labels", "generated_size", "size", "seed")
  found = {f"sampling.{name}": told[name] for name in names} | {"sampling.samples": count, "backbone": told["backbone"]}
  found["size"] = size(told["backbone"], told["sizes"])
  if told["run"] is not None:
    found |= of_run(runs.find(told["model"], told["run"])[1])
  return found


def of_run(cfg: config.RunConfig) -> dict[str, Any]:
  """How a run of this experiment was tuned. Raises UserError for a run of anything else."""
  tuned = cfg.experiment == "cca" and cfg.task == "tune"
  check(tuned, "workdir", cfg.experiment, "holds no run that tunes a model; choose one with --run")
  how = {name: getattr(cfg.tune, name) for name in ("method", "beta", "lam", "uncond", "dropout")}
  sizes = {name: getattr(cfg.model, name) for name in ("layers", "heads", "width", "mlp_width", "vocab", "classes")}
  how |= {"learning_rate": cfg.tx.lr, "batch": cfg.batch, "epochs": round(cfg.steps * cfg.batch / IMAGES, 2)}
  return {"backbone": cfg.backbone, "size": size(cfg.backbone, sizes)} | {
    f"tuning.{name}": x for name, x in how.items()
  }


def of_measurement(path: str) -> dict[str, Any]:
  """What research.tools.frechet wrote. Raises UserError."""
  try:
    told = json.loads(pathlib.Path(path).read_text())
    return {"evaluation.features": told["features"], "evaluation.statistics": pathlib.Path(told["reference"]).name}
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise UserError("measured", path, f"is no file of research.tools.frechet: {one_line(e)}") from None


def size(backbone: str, sizes: Mapping[str, int]) -> str:
  """The name of the released model that has these sizes, fields of its config, or "other"."""
  known = {"llamagen": llamagen, "var": var}[backbone]
  same = lambda name: all(getattr(known.official(name), field) == value for field, value in sizes.items())
  return next(filter(same, known.SIZES), "other")


if __name__ == "__main__":
  run.guard(main)
