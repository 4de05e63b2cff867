"""One small source of every kind, for tests that must hold for all of them."""

import gzip
import json

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from research.data import TextConfig
from research.tools import tokenize

KINDS = ("txt", "jsonl.gz", "parquet", "tfds", "shards", "mixture")


def texts(n=80, seed=0):
  rng = np.random.default_rng(seed)
  words = ["grün", "token", "window", "the", "of", "数据"]
  return [f"{i}: " + " ".join(rng.choice(words, rng.integers(1, 40))) for i in range(n)]


def config(kind, root, **kwargs) -> TextConfig:
  """A config that reads the source of `kind`, made under `root`."""
  root.mkdir(exist_ok=True)
  if kind == "mixture":
    parts = [config(part, root / part, **kwargs).source[0] for part in ("txt", "jsonl.gz", "shards")]
    return TextConfig(source=tuple(parts), weights=(0.5, 0.2, 0.3), **kwargs)
  return TextConfig(source=(SOURCES[kind](root, **kwargs),), **kwargs)


def txt(root, **kwargs):
  for i, text in enumerate(texts(seed=1)):
    (root / f"{i}.txt").write_text(text)
  return f"files:{root}"


def jsonl_gz(root, **kwargs):
  lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts(seed=2))]
  with gzip.open(root / "all.jsonl.gz", "wt", encoding="utf-8") as f:
    f.write("\n".join(lines))
  return f"files:{root}"


def parquet_(root, **kwargs):
  parquet.write_table(pa.table({"body": texts(seed=3)}), root / "all.parquet", row_group_size=30)
  return f"files:{root}?field=body"


def tfds(root, name="tiny", file_format="array_record", splits=("train", "test"), **kwargs):
  import tensorflow_datasets as lib

  def info(self):
    return lib.core.DatasetInfo(
      builder=self,
      features=lib.features.FeaturesDict({"text": lib.features.Text(), "n": lib.features.Scalar(np.int64)}),
    )

  def split_generators(self, downloads):
    return {split: enumerate_examples(i) for i, split in enumerate(splits)}

  def enumerate_examples(seed):
    return ((i, {"text": text, "n": i}) for i, text in enumerate(texts(80 if seed == 0 else 9, seed=seed + 4)))

  members = {"VERSION": lib.core.Version("1.0.0"), "_info": info, "_split_generators": split_generators}
  members |= {"_generate_examples": lambda self: None, "name": name}
  with lib.core.registered.skip_registration():
    builder = type(name.capitalize(), (lib.core.GeneratorBasedBuilder,), members)
  builder(data_dir=root, file_format=file_format).download_and_prepare()
  return f"tfds:{name}?dir={root}"


def shards(root, tokenizer="bytes", bpe_vocab=4096, **kwargs):
  cfg = config("jsonl.gz", root / "text", tokenizer=tokenizer, bpe_vocab=bpe_vocab)
  (root / "shards").mkdir()
  tokenize.write(cfg, root / "shards", 4096)
  return f"shards:{root}/shards"


SOURCES = {"txt": txt, "jsonl.gz": jsonl_gz, "parquet": parquet_, "tfds": tfds, "shards": shards}
