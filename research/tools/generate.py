"""Text from a trained model: `python -m research.tools.generate --workdir=DIR --prompt=TEXT`."""

import sys

from research import run, runs
from research.errors import check
from research.generation import Sampling, generate
from research.tools import models


def main() -> None:
  parser = run.Parser(prog="python -m research.tools.generate", description=__doc__.split(":")[0])
  models.add_arguments(parser)
  parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="to go on from; may be repeated")
  parser.add_argument("--tokens", type=int, default=128, metavar="N", help="at most so many (default: 128)")
  parser.add_argument(
    "--temperature", type=float, default=1.0, metavar="T", help="0: always the likeliest (default: 1)"
  )
  parser.add_argument("--top_k", type=int, default=0, metavar="K", help="draw from the K likeliest (default: all)")
  parser.add_argument(
    "--top_p", type=float, default=1.0, metavar="P", help="from the likeliest with this sum (default: 1)"
  )
  parser.add_argument("--seed", type=int, default=0)
  args, overrides = parser.parse_with_overrides(sys.argv[1:])
  sampling = Sampling(args.temperature, args.top_k, args.top_p)
  check(args.tokens >= 1, "tokens", args.tokens, "use at least 1")
  check(0 <= args.seed < 2**31, "seed", args.seed, "seeds lie in 0 .. 2^31-1")
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
