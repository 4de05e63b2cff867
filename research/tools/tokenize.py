"""Text as shards of tokens: `python -m research.tools.tokenize --source=files:DIR --out=DIR --tokenizer=bpe`.

Train on them with `--config.data.source=shards:DIR`. The text is read as a stream, never
held in memory; a bpe is learnt from the first 64 MiB of the train documents. When
interrupted, even by SIGKILL, the same command goes on after the last whole shard and ends
with the same files, byte for byte.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

from tqdm import tqdm

from research import paths, run
from research.data import TextConfig, load_tokenizer, shards, sources, text
from research.data import tokenizer as tokenizers
from research.errors import check
from research.tools import writing

SAMPLE_BYTES = 64 * 2**20  # of train documents from which a bpe is learnt
BATCH_BYTES = 4 * 2**20  # of documents encoded at once


def main() -> None:
  args = parse_args(sys.argv[1:])
  fields = {name: getattr(args, name) for name in ("tokenizer", "bpe_vocab", "max_bad_records")}
  cfg = TextConfig(source=(args.source,), **fields)
  pieces = args.shard_tokens / shards.PIECE
  check(pieces >= 1 and pieces.is_integer(), "shard_tokens", args.shard_tokens, f"use a multiple of {shards.PIECE}")
  sources.records(args.source)  # what is wrong with the source is told before anything is written
  root = pathlib.Path(args.out).expanduser()
  with writing.alone(root):
    write(cfg, root, args.shard_tokens)


def parse_args(argv: list[str]) -> argparse.Namespace:
  """The command line. Raises UserError."""
  default = {f.name: f.default for f in dataclasses.fields(TextConfig)}
  parser = run.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--source", required=True, help="stdlib, files:DIR or tfds:NAME, see docs/data.md")
  parser.add_argument("--out", required=True, metavar="DIR", help="where the shards and manifest.json go")
  parser.add_argument("--tokenizer", required=True, help="bytes, bpe or hf:PATH/tokenizer.json")
  parser.add_argument("--bpe_vocab", type=int, default=default["bpe_vocab"], help="ids of a bpe")
  parser.add_argument("--shard_tokens", type=int, default=2**26, help="ids in a shard")
  parser.add_argument("--max_bad_records", type=int, default=default["max_bad_records"], help="skipped and named")
  return parser.parse_args(argv)


def write(cfg: TextConfig, root: pathlib.Path, shard_tokens: int) -> None:
  """Writes or goes on writing the shards of `cfg` into `root`, and says what they hold."""
  path = root / shards.MANIFEST
  settings = {"source": cfg.source[0], "tokenizer": cfg.tokenizer, "shard_tokens": shard_tokens}
  if cfg.tokenizer == "bpe":
    settings["bpe_vocab"] = cfg.bpe_vocab
  if path.exists():
    about = writing.begun(root, settings, shards.FORMAT)
  else:
    about = {"format": shards.FORMAT, "complete": False, "settings": settings, "tokenizer": None}
    about |= {"bad_records": [], "splits": {split: {"shards": []} for split in text.SPLITS}}
  tokenizer = _tokenizer(cfg, root, about["tokenizer"])
  about["tokenizer"] = {name: getattr(tokenizer, name) for name in ("name", "vocab", "eod", "sha256")}
  if not about["complete"]:
    save = lambda: paths.write(path, json.dumps(about, indent=1) + "\n")
    save()
    writers = {
      split: shards.ShardWriter(root, split, tokenizer, shard_tokens, entry, save)
      for split, entry in about["splits"].items()
    }
    _stream(cfg, tokenizer, writers, about["bad_records"])
    about["complete"] = True
    save()
  for split, entry in about["splits"].items():
    print(f"{split}: {entry['documents']:,} documents, {entry['bytes']:,} bytes, {entry['tokens']:,} tokens")
  print(f"train on them with --config.data.source=shards:{root} --config.data.tokenizer={cfg.tokenizer}")


def _stream(cfg: TextConfig, tokenizer, writers: dict[str, shards.ShardWriter], bad: list[str]) -> None:
  bad.clear()  # they are met again
  waiting, size = [], 0

  def flush():
    nonlocal size
    for (writer, data), ids in zip(waiting, tokenizer.encode_batch([data for _, data in waiting]), strict=True):
      writer.add(data, ids)
    waiting.clear()
    size = 0

  # disable=None: shown to people only, on a terminal
  with tqdm(desc="tokenized", unit="B", unit_scale=True, disable=None) as bar:
    for split, _, data in text.documents(cfg.source[0], cfg.max_bad_records, bad):
      bar.update(len(data))
      if not writers[split].skips(data):
        waiting.append((writers[split], data))
        size += len(data)
      if size >= BATCH_BYTES:
        flush()
    flush()
  text.check_splits(cfg.source[0], {split: writer.documents for split, writer in writers.items()}, bad)
  for writer in writers.values():
    writer.finish()


def _tokenizer(cfg: TextConfig, root: pathlib.Path, before: dict | None):
  """The tokenizer to write with, its file beside the shards. Raises UserError if it is not the one of `before`."""
  path = root / shards.MODEL
  if cfg.tokenizer != "bpe":
    tokenizer = load_tokenizer(dataclasses.replace(cfg, source=("stdlib",)))
  elif before is None:
    tokenizer = tokenizers.bpe(_sample(cfg), cfg.bpe_vocab)
  else:
    tokenizer = shards.tokenizer(f"shards:{root}", before)
  same = before is None or before["sha256"] == tokenizer.sha256
  check(same, "tokenizer", cfg.tokenizer, f"is not the one that the shards in {root} were written with")
  if tokenizer.model and before is None:
    paths.write(path, tokenizer.model)
  return tokenizer


def _sample(cfg: TextConfig) -> text.Corpus:
  sample, size = [], 0
  for split, name, data in text.documents(cfg.source[0], cfg.max_bad_records, []):
    if split == "train":
      sample.append((name, data))
      size += len(data)
    if size >= SAMPLE_BYTES:
      break
  return text.corpus(sample)


if __name__ == "__main__":
  run.guard(main)
