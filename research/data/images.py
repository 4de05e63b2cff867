"""Labelled images by name: digits that come with scikit-learn, TFDS, folders, tar shards.

An image is decoded when its row is read. One that cannot be is named, counted, and the
next one takes its place, so that a row stays a function of its index.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import hashlib
import io
import logging
import os
from pathlib import Path
import tarfile
import threading
from typing import Literal

import numpy as np
from PIL import Image

from research.data import sources
from research.data.text import SPLITS, name_hash
from research.errors import UserError, check, one_line

VALIDATION_FRACTION = {"digits": 0.25}  # the digits are few; of others:
_VALIDATION_FRACTION = 0.05
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_BAD = (*sources.BAD, Image.DecompressionBombError, SyntaxError)  # Pillow raises the last for a broken PNG

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ImageConfig:
  """Which images, and how they become arrays [size, size, channels]."""

  source: str = "digits"  # or tfds:NAME, folder:DIR, tar:DIR; docs/data.md
  size: int = 8  # pixels a side
  channels: int = 1  # 1: grey, 3: RGB
  resize: float = 1.0  # the shorter side becomes resize x size before size x size is cut out
  crop: Literal["centre", "random"] = "centre"  # random: of training images
  flip: bool = False  # half of the training images, left to right
  max_bad_records: int = 10  # skipped and named; one more is an error

  def __post_init__(self):
    check(self.size >= 1, "size", self.size, "use a positive number of pixels")
    check(self.channels in (1, 3), "channels", self.channels, "use 1 (grey) or 3 (RGB)")
    check(self.resize >= 1, "resize", self.resize, "use 1 or more, e.g. 1.1")
    check(self.max_bad_records >= 0, "max_bad_records", self.max_bad_records, "use 0 or more")


@dataclasses.dataclass(frozen=True)
class Item:
  """One image, not yet read."""

  name: str
  # (uint8 [height, width] or [height, width, channels], label); raises one of _BAD
  read: Callable[[], tuple[np.ndarray, int]]


class Images:
  """Random access to the rows of one split: images uint8 [side, side, channels], labels int32, weights float32 1.

  side is round(resize * size): `augment` cuts size x size out of it. Weights are 0 in the rows that
  fill up a batch. `bad` names what could not be read so far.
  """

  def __init__(self, items: list[Item], classes: int, cfg: ImageConfig):
    self.items, self.bad, self._classes, self._cfg = items, {}, classes, cfg
    self._side, self._lock = round(cfg.resize * cfg.size), threading.Lock()

  def __len__(self) -> int:
    return len(self.items)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    for n in range(len(self)):
      row = self.read((i + n) % len(self))
      if row is not None:
        return row
    raise UserError("source", self._cfg.source, "no image can be read")

  def read(self, i: int) -> dict[str, np.ndarray] | None:
    """Row i, or None where its image cannot be read: then it is named and counted."""
    item = self.items[i]
    try:
      image, label = item.read()
      if not 0 <= label < self._classes:
        raise ValueError(f"label {label} is not in 0 .. {self._classes - 1}")
      pixels = square(image, self._side, self._cfg.channels)
      return {"images": pixels, "labels": np.int32(label), "weights": np.float32(1)}
    except _BAD as e:
      self._count(item.name, e)
      return None

  def _count(self, name: str, e: Exception) -> None:
    why = one_line(e)
    with self._lock:
      if name not in self.bad:
        self.bad[name] = why
        _log.warning("skipped %s: %s", name, why)
    if len(self.bad) > self._cfg.max_bad_records:
      fix = f"{name} is bad image number {len(self.bad)} ({why}); repair or remove it, or raise the limit"
      raise UserError("max_bad_records", self._cfg.max_bad_records, fix) from e


@dataclasses.dataclass(frozen=True)
class ImageData:
  """Both splits and the names of the classes, in the order of their labels."""

  splits: Mapping[str, Images]
  classes: tuple[str, ...]
  cfg: ImageConfig

  def info(self) -> dict:
    """For the manifest: how many images of which classes, and what was skipped so far."""
    return {
      "source": self.cfg.source,
      "classes": len(self.classes),
      "images": {split: len(images) for split, images in self.splits.items()},
      "sha256": {split: _digest(images.items) for split, images in self.splits.items()},
      "bad_records": [name for images in self.splits.values() for name in images.bad],
    }


def load(cfg: ImageConfig) -> ImageData:
  """The images of `cfg`; only their names and labels are read yet.

  A source's own validation or test split is kept. Else a hash of an image's name (digits: of its
  pixels) decides, so that adding images moves none. Raises UserError (`source`).
  """
  kind, argument, options = sources.parse(cfg.source, KINDS)
  classes, found = KINDS[kind][0](cfg.source, argument, **options)
  limit = int(VALIDATION_FRACTION.get(kind, _VALIDATION_FRACTION) * 2**64)
  splits = {split: [] for split in SPLITS}
  for item, split, key in found:
    chosen = split or SPLITS[int.from_bytes(key[:8], "big") < limit]
    splits[chosen].append(item)
  for split, items in splits.items():
    check(len(items) > 0, "source", cfg.source, f"has no image for {split}")
  return ImageData({split: Images(items, len(classes), cfg) for split, items in splits.items()}, tuple(classes), cfg)


def augment(cfg: ImageConfig, row: Mapping[str, np.ndarray], rng: np.random.Generator | None) -> dict[str, np.ndarray]:
  """A row of `Images` with size x size of its pixels: from the middle, or with an `rng` as the config says."""
  image = row["images"]
  room = image.shape[0] - cfg.size
  top, left = (room // 2, room // 2)
  if rng is not None and cfg.crop == "random":
    top, left = rng.integers(0, room + 1, 2)
  image = image[top : top + cfg.size, left : left + cfg.size]
  if rng is not None and cfg.flip and rng.integers(2):
    image = image[:, ::-1]
  return {**row, "images": np.ascontiguousarray(image)}


def ten_crops(image: np.ndarray, size: int) -> np.ndarray:
  """[side, side, channels] -> [10, size, size, channels]: the corners and the middle, then those five mirrored."""
  room = image.shape[0] - size
  corners = ((0, 0), (0, room), (room, 0), (room, room), (room // 2, room // 2))
  crops = np.stack([image[top : top + size, left : left + size] for top, left in corners])
  return np.concatenate([crops, crops[:, :, ::-1]])


def square(image: np.ndarray, side: int, channels: int) -> np.ndarray:
  """uint8 [height, width(, channels)] -> [side, side, channels]: resized to its shorter side, cut from the middle.

  Halved by averages of 2 x 2 while it is twice too large, then bicubic, as in the preprocessing of
  Dhariwal and Nichol (2021, arXiv 2105.05233), which LlamaGen's published numbers use.
  """
  picture = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
  picture = picture.convert("L" if channels == 1 else "RGB")
  while min(picture.size) >= 2 * side:
    picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
  if min(picture.size) != side:
    scale = side / min(picture.size)
    size = (max(round(picture.width * scale), side), max(round(picture.height * scale), side))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
  array = np.asarray(picture)
  top, left = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
  return array[top : top + side, left : left + side].reshape(side, side, channels)


def digits(source: str, argument: str):
  """1,797 handwritten digits of 8 x 8 pixels in 17 greys, which scikit-learn carries (Alpaydin and Kaynak, 1998)."""
  check(not argument, "source", source, "digits takes no argument; write source=digits")
  from sklearn import datasets

  found = datasets.load_digits()
  images = np.round(found.images * (255 / 16)).astype(np.uint8)

  def items():
    for i, (image, label) in enumerate(zip(images, found.target, strict=True)):
      yield (
        Item(f"digits:{i}", functools.partial(_pair, image, int(label))),
        None,
        hashlib.sha256(image.tobytes()).digest(),
      )

  return [str(name) for name in found.target_names], items()


def folder(source: str, argument: str):
  """DIR/CLASS/*.png (.jpg, .webp ...), or DIR/{train,validation}/CLASS/*.png; val and test mean validation too."""
  root = _directory(source, argument)
  parts = {name: split for name, split in _FOLDERS.items() if (root / name).is_dir()}
  held_out = next((name for name in ("validation", "val", "test") if name in parts), None)
  roots = {root / "train": "train", root / held_out: "validation"} if "train" in parts and held_out else {root: None}
  found = [(path, split, file) for path, split in roots.items() for file in sources.find(path, _SUFFIXES)]
  classes = sorted({Path(name).parts[0] for _, _, (name, _) in found if len(Path(name).parts) > 1})
  check(len(classes) > 0, "source", source, "holds no CLASS/image.png; a folder a class is needed")

  def items():
    for path, split, (name, file) in found:
      if len(Path(name).parts) > 1:
        label = classes.index(Path(name).parts[0])
        yield Item(str(path / name), functools.partial(_decode_file, file, label)), split, name_hash(name)

  return classes, items()


_FOLDERS = {"train": "train", "validation": "validation", "val": "validation", "test": "validation"}


def tar(source: str, argument: str, classes: str = ""):
  """DIR/*.tar with KEY.jpg (.png, ...) and KEY.cls, a label in digits, beside each other: the WebDataset layout.

  classes: their number, where the largest label does not tell it.
  """
  root = _directory(source, argument)
  shards = sources.find(root, (".tar",))
  check(len(shards) > 0, "source", source, "holds no .tar file")
  labels, images = {}, []
  for name, path in shards:
    try:
      with tarfile.open(path) as shard:
        for member in filter(tarfile.TarInfo.isfile, shard):
          key, suffix = os.path.splitext(f"{name}/{member.name}")
          if suffix.lower() in _SUFFIXES:
            images.append((key, f"{name}/{member.name}", path, member.offset_data, member.size))
          elif suffix == ".cls":
            labels[key] = int(shard.extractfile(member).read())
    except (tarfile.TarError, ValueError, OSError, EOFError) as e:
      raise UserError("source", source, f"{name} cannot be read: {one_line(e)}") from None
  lacking = next((name for key, name, *_ in images if key not in labels), None)
  check(lacking is None, "source", source, f"{lacking} has no label; put KEY.cls beside KEY.jpg")
  check(not classes or classes.isdecimal(), "source", source, "?classes= takes a whole number")
  count = int(classes) if classes else max(labels.values(), default=-1) + 1

  def items():
    for key, name, path, offset, size in images:
      yield Item(name, functools.partial(_decode_part, path, offset, size, labels[key])), None, name_hash(key)

  return [str(i) for i in range(count)], items()


def tfds(source: str, argument: str, image: str = "image", label: str = "label", split: str = "train", dir: str = ""):
  """A prepared TFDS dataset with an image and a class label."""
  name, found = sources.tfds_splits(source, argument, (image, label), split, dir)
  features = found[0][2].dataset_info.features
  classes = getattr(features[label], "names", None)
  check(bool(classes), "source", source, f"its field {label} is no class label; choose one with ?label=")

  def read(rows, i) -> tuple[np.ndarray, int]:
    try:
      row = rows[i]
      return np.asarray(row[image]), int(row[label])
    except RuntimeError as e:  # a record that fails the checksum of its format
      raise ValueError(one_line(e)) from e

  def items():
    for of, part, rows in found:
      for i in range(len(rows)):
        item = Item(f"{name}/{of}:{i}", functools.partial(read, rows, i))
        yield item, part, name_hash(item.name)

  return classes, items()


def _directory(source: str, argument: str) -> Path:
  check(argument != "", "source", source, "name a directory, as in source=folder:DIR")
  root = Path(argument).expanduser()
  check(root.is_dir(), "source", source, "there is no such directory")
  return root


def _decode(data: bytes) -> np.ndarray:
  with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
    return np.asarray(picture.convert("L" if picture.mode in ("1", "L", "I;16") else "RGB"))


def _pair(image: np.ndarray, label: int) -> tuple[np.ndarray, int]:
  return image, label


def _decode_file(path: Path, label: int) -> tuple[np.ndarray, int]:
  return _decode(path.read_bytes()), label


def _decode_part(path: Path, offset: int, size: int, label: int) -> tuple[np.ndarray, int]:
  with path.open("rb") as file:
    file.seek(offset)
    data = file.read(size)
  if len(data) < size:
    raise EOFError("the shard ends before the image does")
  return _decode(data), label


def _digest(items: list[Item]) -> str:
  """Of names: no image is read for it."""
  return hashlib.sha256("\n".join(item.name for item in items).encode()).hexdigest()


# By kind: the function of (source, argument, **options) -> (classes, (Item, split or None, hash) of each image), and
# the options it takes.
KINDS = {
  "digits": (digits, ()),
  "tfds": (tfds, ("image", "label", "split", "dir")),
  "folder": (folder, ()),
  "tar": (tar, ("classes",)),
}
