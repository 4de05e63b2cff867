"""A trained run's parameters as published weights: `python -m research.tools.export --workdir=DIR --out=DIR`.

Writes `config.json` and safetensors files that other people's code reads; see
`research.models.convert`. A run on text also leaves its tokenizer there, where that is a file.
"""

import pathlib

from research import run, runs
from research.models import convert
from research.tools import models


def main() -> None:
  parser = run.Parser(prog="python -m research.tools.export", description=__doc__.split(":")[0])
  parser.add_argument("--workdir", required=True, metavar="DIR", help="of the run")
  parser.add_argument("--run", metavar="ARM-SEED", help="which of the workdir's runs, if it has several")
  parser.add_argument("--out", required=True, metavar="DIR", help="a new directory")
  parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: float32)")
  args = parser.parse_args()
  with runs.mesh():
    opened = models.open_run(args.workdir, args.run)
    settings = {"max_position_embeddings": opened.length}
    if opened.reads_text:
      settings |= {"bos_token_id": opened.tokenizer().eod, "eos_token_id": opened.tokenizer().eod}
    # a tokenizer is trained with more beside it
    model = getattr(opened.model, "tokenizer", opened.model)
    convert.export(model, args.out, settings=settings, dtype=args.dtype)
    if opened.reads_text and (file := opened.tokenizer().file()):
      pathlib.Path(args.out, "tokenizer.json").write_text(file)
  print(f"{opened.name} -> {args.out}")


if __name__ == "__main__":
  run.guard(main)
