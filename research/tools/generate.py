"""Text from a trained model: `python -m research.tools.generate --workdir=DIR --prompt=TEXT`."""

import sys

from research import run, runs
from research.errors import check
from research.generation import generate
from research.tools import models


def main() -> None:
  parser = run.Parser(prog="python -m research.tools.generate", description=__doc__.split(":")[0])
  models.add_arguments(parser)
  parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="to go on from; may be repeated")
  parser.add_argument("--tokens", type=int, default=128, metavar="N", help="at most so many (default: 128)")
  models.add_sampling(parser)
  args, overrides = parser.parse_with_overrides(sys.argv[1:])
  sampling = models.sampling(args)
  check(args.tokens >= 1, "tokens", args.tokens, "use at least 1")
  with runs.mesh(overrides):
    opened = models.open_model(args, overrides)
    tokenizer, begin = opened.tokenizer(), opened.begin()
    prompts = [[*begin, *map(int, tokenizer.encode(text.encode()))] for text in args.prompt]
    check(all(prompts), "prompt", "''", "needs text: this model has no token that begins one")
    made = generate(opened.model, prompts, tokens=args.tokens, sampling=sampling, stop=(tokenizer.eod,), seed=args.seed)
  for text, ids in zip(args.prompt, made, strict=True):
    if len(made) > 1:
      print(f"--- {text!r}")
    # Bytes that are no UTF-8, as a byte-level model may make them, become U+FFFD.
    print(text + tokenizer.decode(ids).decode(errors="replace"))


if __name__ == "__main__":
  run.guard(main)
