"""What the tools for people share: which model, and what text is to it."""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

from research import config, data, paths, report, runs
from research.data import TextConfig, Tokenizer
from research.errors import UserError, check
from research.generation import Sampling
from research.models import convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """--workdir with --run, or --weights with --tokenizer."""
  which = parser.add_mutually_exclusive_group(required=True)
  which.add_argument("--workdir", metavar="DIR", help="of a run; --config.NAME=VALUE changes how its model is executed")
  which.add_argument("--weights", metavar="DIR", help="published weights: config.json and safetensors files")
  parser.add_argument("--run", metavar="ARM-SEED", help="which of the workdir's runs, if it has several")
  parser.add_argument(
    "--tokenizer", metavar="NAME", help="of --weights: bytes, or hf:PATH (default: hf:DIR/tokenizer.json)"
  )


def add_sampling(parser: argparse.ArgumentParser) -> None:
  """--temperature, --top_k, --top_p and --seed; `sampling` reads them."""
  default = Sampling()
  parser.add_argument("--temperature", type=float, default=default.temperature, metavar="T", help="0: the likeliest")
  parser.add_argument("--top_k", type=int, default=default.top_k, metavar="K", help="of the K likeliest (default: all)")
  parser.add_argument("--top_p", type=float, default=default.top_p, metavar="P", help="of the likeliest with this sum")
  parser.add_argument("--seed", type=int, default=0)


def sampling(args: argparse.Namespace) -> Sampling:
  """How to draw. Raises UserError, also for the seed."""
  check(0 <= args.seed < 2**31, "seed", args.seed, "seeds lie in 0 .. 2^31-1")
  return Sampling(args.temperature, args.top_k, args.top_p)


@dataclasses.dataclass(frozen=True)
class Opened:
  """A model on the current mesh, and what text is to it."""

  model: Any
  cfg: config.RunConfig | None  # of its run; None for published weights
  name: str
  length: int  # of the rows it was trained on
  reads_text: bool
  tokenizer: Callable[[], Tokenizer]  # raises UserError if the model does not read text
  begin: Callable[[], tuple[int, ...]]  # the ids that begin every text


def open_model(args: argparse.Namespace, overrides: list[str]) -> Opened:
  """The model the arguments name, on the current mesh. Raises UserError."""
  if args.workdir is not None:
    check(args.tokenizer is None, "tokenizer", args.tokenizer, "a workdir knows its own; leave it out")
    return open_run(args.workdir, args.run, overrides)
  check(args.run is None, "run", args.run, "goes with --workdir")
  check(not overrides, "config", overrides[0] if overrides else "", "goes with --workdir")
  weights = convert.read(args.weights)
  said, family = weights.config, weights.family
  fix = f"is a {family.name}: it knows images, and this tool works on text; try research.tools.sample"
  check(not family.images, "weights", args.weights, fix)
  cfg, model = convert.load(weights)
  bos = said.get("bos_token_id")
  length = int(said.get("max_position_embeddings") or 2048)
  name = pathlib.Path(args.weights).resolve().name
  tokenizer = functools.cache(lambda: _published_with(args, cfg.vocab))
  return Opened(model, None, name, length, True, tokenizer, lambda: () if bos is None else (int(bos),))


def open_run(workdir: str, run: str | None, overrides: Sequence[str] = ()) -> Opened:
  """The model of a workdir's run ("ARM-SEED"; None: the only one), on the current mesh. Raises UserError."""
  name, _ = runs.find(workdir, run)
  cfg, model = runs.load(workdir, name, overrides)
  about = report.manifest(paths.parse(workdir))["data"].get(name.rpartition("-")[0], {}).get("tokenizer")
  tokenizer = functools.cache(lambda: _trained_with(workdir, name, cfg, about))
  # A packed document has the end of the one before it as its first input; prompts of preferences say what they have.
  begin = lambda: getattr(cfg.data, "begin", (tokenizer().eod,))
  return Opened(model, cfg, name, cfg.length, about is not None, tokenizer, begin)


def _trained_with(workdir: str, name: str, cfg: config.RunConfig, about: dict | None) -> Tokenizer:
  check(about is not None, "workdir", workdir, f"{name} was not trained on text")
  try:
    tokenizer = data.load_tokenizer(cfg.data)
  except UserError as e:
    raise e.under("data") from None
  same = tokenizer.sha256 == about["sha256"]
  check(same, "data.source", cfg.data.source, "its text has changed since the run, and with it what its tokens mean")
  return tokenizer


def _published_with(args: argparse.Namespace, vocab: int) -> Tokenizer:
  beside = pathlib.Path(args.weights, "tokenizer.json")
  spec = args.tokenizer or (f"hf:{beside}" if beside.exists() else None)
  check(spec is not None, "tokenizer", "not given", f"{args.weights} has no tokenizer.json; use bytes or hf:PATH")
  check(spec != "bpe", "tokenizer", spec, "use bytes or hf:PATH/tokenizer.json")
  tokenizer = data.load_tokenizer(TextConfig(tokenizer=spec))
  check(tokenizer.vocab <= vocab, "tokenizer", spec, f"has {tokenizer.vocab} ids, and the model {vocab}")
  return tokenizer
