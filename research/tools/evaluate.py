"""What a trained model can do: `python -m research.tools.evaluate --workdir=DIR [--source=...] [--choices=FILE.jsonl]`.

Perplexity on its own validation text or on all of `--source` (files:DIR and the like, see
docs/data.md), accuracy on multiple-choice questions, and the induction scores of its heads.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from research import data, run, runs
from research.data import PackedDocuments, text
from research.errors import check
from research.evals import choices
from research.evals.induction import induction_scores
from research.evals.likelihood import perplexity
from research.markdown import table
from research.mesh import batch_shard
from research.tools import models

_BATCH = 16


def main() -> None:
  parser = run.Parser(
    prog="python -m research.tools.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  models.add_arguments(parser)
  parser.add_argument(
    "--source", metavar="SOURCE", help="text whose perplexity to take (default: the run's validation split)"
  )
  parser.add_argument("--choices", action="append", default=[], metavar="FILE.jsonl", help="questions; may be repeated")
  parser.add_argument("--out", metavar="FILE.json", help="also write the numbers there")
  args, overrides = parser.parse_with_overrides(sys.argv[1:])
  out = pathlib.Path(args.out) if args.out else None
  check(
    out is None or (out.parent.is_dir() and not out.is_dir()), "out", args.out, "name a file in a directory that exists"
  )
  questions = {path: choices.read(path) for path in args.choices}
  with runs.mesh(overrides):
    opened = models.open_model(args, overrides)
    results: dict[str, Any] = {"model": opened.name}
    if args.source or (opened.cfg is not None and opened.reads_text and not questions):
      results["perplexity"] = _perplexity(opened, args.source)
      print(_columns(results["perplexity"]), end="\n\n")
    for path, of_file in questions.items():
      results.setdefault("choices", {})[path] = choices.score(
        opened.model, opened.tokenizer(), of_file, max_length=opened.length, prefix=opened.begin()
      )
      print(f"{path}\n\n{_columns(results['choices'][path])}", end="\n\n")
    scores = induction_scores(opened.model, length=min(64, opened.length // 2))
  results["induction"] = {name: np.round(x, 6).tolist() for name, x in scores.items()}
  print(_heads(scores))
  if out is not None:
    out.write_text(json.dumps(results, indent=1) + "\n")


def _perplexity(opened: models.Opened, source: str | None) -> dict[str, Any]:
  tokenizer = opened.tokenizer()
  if source is None:
    held = data.load(opened.cfg.data, opened.length, opened.cfg.seed)
    rows, size, name = held.split("validation"), held.info()["bytes"]["validation"], "validation"
  else:
    bad: list[str] = []
    documents = [content for _, _, content in text.documents(source, 10, bad)]
    check(bool(documents), "source", source, "has no text")
    ids = tokenizer.encode_batch(documents)
    rows, size, name = (
      PackedDocuments(ids, opened.length, tokenizer.eod, drop_last=False),
      sum(map(len, documents)),
      source,
    )
  batches = data.batches(rows, _BATCH, seed=0, shard=batch_shard(jax.sharding.get_mesh()), train=False)
  return {"text": name, "bytes": size} | perplexity(opened.model, batches, size)


def _columns(values: dict[str, Any]) -> str:
  return table(list(values), [[f"{v:.4f}" if isinstance(v, float) else v for v in values.values()]])


def _heads(scores: dict[str, np.ndarray]) -> str:
  """What the model makes of a repetition, and the strongest heads, where they can be looked into."""
  first, second = scores["nats_first"], scores["nats_second"]
  told = f"random tokens, said twice: {first:.3f} nats a token the first time, {second:.3f} the second"
  if "induction" not in scores:
    return told
  layers, heads = scores["induction"].shape
  order = np.argsort(-np.maximum(scores["induction"], scores["same"]), axis=None)[:8]
  rows = []
  for i in order:
    layer, head = divmod(int(i), heads)
    rows.append(
      [layer, head, *(f"{scores[name][layer, head]:.3f}" for name in ("induction", "same", "next", "previous"))]
    )
  header = [
    "layer",
    "head",
    "looks at what followed",
    "at the same token",
    "at the one after next",
    "at the previous token",
  ]
  return f"{told}\nthe strongest of {layers * heads} heads\n\n{table(header, rows)}"


if __name__ == "__main__":
  run.guard(main)
