"""Codes of images on disk: ArrayRecord shards that `research.tools.codes` writes, and their rows.

A record is an image: its label, then the codes of each of its views (crops of it), little-endian. So an
image is read in one piece, whichever of its views an epoch takes.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from research.data import shards
from research.data.text import SPLITS
from research.errors import check

FORMAT, TOOL = "codes-1", "research.tools.codes"
_LABEL = np.dtype("<u4")


@dataclasses.dataclass(frozen=True)
class CodesConfig:
  """Codes written by `research.tools.codes`.

  source: codes:DIR, or "" for none. tokenizer: for VAR, which reads what its tokenizer makes of codes: the weights, or
  the workdir, that they were written with; tokenizer_run: of a workdir with several runs, ARM-SEED.
  """

  source: str = ""
  tokenizer: str = ""
  tokenizer_run: str = ""

  def __post_init__(self):
    ok = self.source == "" or self.source.startswith("codes:")
    check(ok, "source", self.source, "write codes:DIR; to make them: python -m research.tools.codes")


class Codes:
  """Random access to a split: views int32 [views, tokens], labels int32, weights float32 1."""

  def __init__(self, source: str, split: str):
    about = manifest(source)
    entry = about["splits"][split]
    self._source, self._images, self._size = source, entry["images"], about["settings"]["shard_images"]
    self._records = shards.Records(source, entry["shards"], TOOL)
    self._shape = (entry["views"], about["tokens"])
    self._dtype = shards.dtype(about["tokenizer"]["vocab"])

  def __len__(self) -> int:
    return self._images

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    shard, record = divmod(i, self._size)
    data = self._records.read(shard, record)
    views, tokens = self._shape
    if len(data) != _LABEL.itemsize + views * tokens * self._dtype.itemsize:
      raise shards.damaged(self._source, self._records.shards[shard]["file"], TOOL)
    codes = np.frombuffer(data, self._dtype, offset=_LABEL.itemsize).reshape(self._shape)
    label = np.frombuffer(data, _LABEL, count=1)[0]
    return {"views": codes.astype(np.int32), "labels": np.int32(label), "weights": np.float32(1)}

  def __repr__(self) -> str:
    return f"Codes({self._source}, {self._images} images)"


def pick(row: Mapping[str, np.ndarray], rng: np.random.Generator | None) -> dict[str, np.ndarray]:
  """A row of `Codes` with the codes of one view, int32 [tokens]: any of them with an `rng`, else the first."""
  views = row["views"]
  chosen = views[0 if rng is None else rng.integers(len(views))]
  return {"codes": chosen, "labels": row["labels"], "weights": row["weights"]}


def manifest(source: str) -> dict[str, Any]:
  """What `codes:DIR` holds, of what, by which tokenizer. Raises UserError for what is not whole."""
  return shards.manifest(source, TOOL, FORMAT)


def info(source: str) -> dict[str, Any]:
  """For a run's manifest."""
  about = manifest(source)
  splits = about["splits"].items()
  return {
    "source": source,
    "written_from": about["settings"],
    "tokenizer_of_images": about["tokenizer"],
    "classes": len(about["classes"]),
    "images": {split: entry["images"] for split, entry in splits},
    "views": {split: entry["views"] for split, entry in splits},
    "sha256": {split: _digest(entry["shards"]) for split, entry in splits},
    "bad_records": [name for _, entry in splits for name in entry["bad_records"]],
  }


def _digest(entries: list[dict]) -> str:
  return hashlib.sha256("".join(entry["sha256"] for entry in entries).encode()).hexdigest()


class Writer:
  """Writes one split, shard by shard, going on after the last whole one of a manifest's entry.

  `entry` is the split's part of the manifest; its `cursor` says how many items of the source lie in
  whole shards. `on_shard()` is called when another one does.
  """

  def __init__(self, root: Path, split: str, vocab: int, shard_images: int, entry: dict, on_shard):
    self.entry, self._root, self._split, self._on_shard = entry, root, split, on_shard
    self._size, self._room, self._dtype = shard_images, shard_images, shards.dtype(vocab)
    self._writer, self._path = None, None

  def add(self, item: int, views: np.ndarray, label: int) -> None:
    """Appends the codes int [views, tokens] of the source's item number `item`."""
    if self._writer is None:
      self._writer, self._path = shards.begin_shard(self._root, self._split, self.entry)
    self._writer.write(np.asarray(label, _LABEL).tobytes() + views.astype(self._dtype).tobytes())
    self._room -= 1
    if self._room == 0:
      self._end(item + 1)

  @property
  def pending(self) -> int:
    """Images in the shard that is not whole yet."""
    return self._size - self._room

  def finish(self, items: int) -> None:
    """Writes what is left of a split of so many items."""
    if self._writer is not None:
      self._end(items)
    self.entry["cursor"] = items

  def _end(self, cursor: int) -> None:
    self.entry["shards"].append(shards.end_shard(self._writer, self._path))
    self.entry["images"] += self._size - self._room
    self._writer, self._room = None, self._size
    self.entry["cursor"] = cursor
    self._on_shard()


def empty(views: Mapping[str, int]) -> dict[str, dict[str, Any]]:
  """The entries of splits of which nothing is written; views: how many an image has in each."""
  blank = lambda n: {"views": n, "images": 0, "cursor": 0, "shards": [], "bad_records": []}
  return {split: blank(views[split]) for split in SPLITS}
