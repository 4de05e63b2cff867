"""Images of every source: what is read, how it is split, cut and mirrored, what is told of those that are broken."""

import functools
import io
import tarfile

import numpy as np
from PIL import Image
import pytest

from research.data import images
from research.data.images import ImageConfig
from research.data.loader import batches
from research.errors import UserError

RNG = np.random.default_rng(0)


def picture(seed: int, side: int = 12) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def as_png(pixels: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG")
  return buffer.getvalue()


def folder(root, count=30, names=("ant", "bee", "cat")):
  for i in range(count):
    path = root / names[i % len(names)] / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(as_png(picture(i)))
  return f"folder:{root}"


def tar(root, count=30, classes=3):
  for shard in range(2):
    with tarfile.open(root / f"{shard}.tar", "w") as out:
      for i in range(shard, count, 2):
        for name, data in ((f"{i}.png", as_png(picture(i))), (f"{i}.cls", str(i % classes).encode())):
          info = tarfile.TarInfo(name)
          info.size = len(data)
          out.addfile(info, io.BytesIO(data))
  return f"tar:{root}"


def tfds(root, name, sizes, labels):
  """A prepared dataset with so many pictures in each split."""
  import tensorflow_datasets as lib

  features = lib.features.FeaturesDict(
    {"image": lib.features.Image(shape=(12, 12, 3)), "label": lib.features.ClassLabel(names=labels)}
  )

  def examples(start, size):
    for i in range(start, start + size):
      path = root / f"{i}.png"  # as a file: an encoder of arrays needs TensorFlow
      path.write_bytes(as_png(picture(i)))
      yield i, {"image": str(path), "label": i % len(labels)}

  starts = np.cumsum([0, *sizes.values()]).tolist()
  members = {
    "VERSION": lib.core.Version("1.0.0"),
    "_info": lambda self: lib.core.DatasetInfo(builder=self, features=features),
    "_split_generators": lambda self, _: dict(zip(sizes, map(examples, starts, sizes.values()), strict=True)),
    "_generate_examples": lambda self: None,
    "name": name,
  }
  root.mkdir(exist_ok=True)
  with lib.core.registered.skip_registration():
    builder = type(name.capitalize(), (lib.core.GeneratorBasedBuilder,), members)
  builder(data_dir=root, file_format="array_record").download_and_prepare()


def rows(data, split):
  return [data.splits[split][i] for i in range(len(data.splits[split]))]


def test_the_digits_are_split_for_ever():
  data = images.load(ImageConfig())
  assert {split: len(x) for split, x in data.splits.items()} == {"train": 1300, "validation": 497}
  assert data.info()["sha256"]["validation"].startswith("49f9f27d0c12")
  assert set(np.bincount([row["labels"] for row in rows(data, "validation")]) > 35) == {True}
  row = data.splits["train"][0]
  assert row["images"].shape == (8, 8, 1)
  assert row["images"].dtype == np.uint8
  assert max(row["images"].max() for row in rows(data, "train")) == 255


@pytest.mark.parametrize("make", [folder, tar])
def test_pixels_and_labels_of_a_source_are_those_written(tmp_path, make):
  data = images.load(ImageConfig(make(tmp_path), size=12, channels=3))
  assert len(data.classes) == 3
  found = {row["images"].tobytes(): int(row["labels"]) for split in data.splits for row in rows(data, split)}
  assert found == {picture(i).tobytes(): i % 3 for i in range(30)}


def test_a_dataset_of_tfds_is_read_without_tensorflow(tmp_path):
  tfds(tmp_path, "dots", {"train": 20, "test": 5}, ("a", "b"))
  data = images.load(ImageConfig(f"tfds:dots?dir={tmp_path}", size=12, channels=3))
  assert data.classes == ("a", "b")
  assert {split: len(x) for split, x in data.splits.items()} == {"train": 20, "validation": 5}
  found = {row["images"].tobytes(): int(row["labels"]) for row in rows(data, "validation")}
  assert found == {picture(i).tobytes(): i % 2 for i in range(20, 25)}
  with pytest.raises(UserError, match="no field x; choose one"):
    images.load(ImageConfig(f"tfds:dots?dir={tmp_path}&image=x"))


def test_adding_images_moves_none_between_the_splits(tmp_path):
  folder(tmp_path, 60)
  before = images.load(ImageConfig(f"folder:{tmp_path}"))
  folder(tmp_path, 90)
  after = images.load(ImageConfig(f"folder:{tmp_path}"))
  for split in before.splits:
    assert {i.name for i in before.splits[split].items} <= {i.name for i in after.splits[split].items}


def test_a_folder_with_splits_of_its_own_keeps_them(tmp_path):
  folder(tmp_path / "train", 9)
  folder(tmp_path / "val", 6)
  data = images.load(ImageConfig(f"folder:{tmp_path}"))
  assert {split: len(x) for split, x in data.splits.items()} == {"train": 9, "validation": 6}
  assert data.classes == ("ant", "bee", "cat")


def test_broken_images_are_named_and_counted_and_their_neighbour_stands_in(tmp_path):
  source = folder(tmp_path, 60)
  data = images.load(ImageConfig(source, size=12, channels=3, max_bad_records=2))
  train = data.splits["train"]
  paths = [tmp_path / item.name for item in train.items]
  paths[3].write_bytes(paths[3].read_bytes()[:60])
  paths[4].write_bytes(b"no image")
  assert train[3]["images"].tobytes() == train[5]["images"].tobytes()
  assert train[4]["images"].tobytes() == train[5]["images"].tobytes()
  assert sorted(data.info()["bad_records"]) == sorted(train.items[i].name for i in (3, 4))
  paths[8].write_bytes(b"")
  with pytest.raises(UserError) as error:
    train[8]
  assert train.items[8].name in str(error.value)
  assert "number 3" in str(error.value)


def test_images_are_resized_to_their_shorter_side_and_cut_from_the_middle():
  wide = np.zeros((16, 48), np.uint8)
  wide[:, 16:32] = 200
  assert (images.square(wide, 16, 1) == 200).all()
  assert (images.square(wide, 4, 1)[1:-1, 1:-1] == 200).all()
  assert images.square(wide, 4, 3).shape == (4, 4, 3)
  assert images.square(np.full((5, 9, 3), 7, np.uint8), 20, 3).tolist() == np.full((20, 20, 3), 7).tolist()


def test_ten_crops_are_the_corners_the_middle_and_their_mirror_images():
  image = np.arange(25).reshape(5, 5, 1).astype(np.uint8)
  crops = images.ten_crops(image, 3)[..., 0]
  assert crops[:, 1, 1].tolist() == [6, 8, 16, 18, 12] * 2
  assert (crops[5:] == crops[:5, :, ::-1]).all()


def test_crops_and_flips_of_training_depend_on_seed_and_place_alone():
  cfg = ImageConfig(resize=1.5, crop="random", flip=True)
  train = images.load(cfg).splits["train"]
  stream = lambda seed: batches(train, 8, seed=seed, train=True, prepare=functools.partial(images.augment, cfg))
  iterator = iter(stream(0))
  first = [next(iterator) for _ in range(6)]
  again = iter(stream(0))
  state = [next(again) for _ in range(3)] and again.get_state()
  resumed = iter(stream(0))
  resumed.set_state(state)
  for want in first[3:]:
    got = next(resumed)
    assert all((got[name] == want[name]).all() for name in want)
  assert (next(iter(stream(1)))["images"] != first[0]["images"]).any()


def test_an_image_is_cut_and_mirrored_anew_in_every_epoch_and_never_in_validation():
  cfg = ImageConfig(resize=1.5, crop="random", flip=True)
  one = images.Images(images.load(cfg).splits["train"].items[:1], 10, cfg)
  prepare = functools.partial(images.augment, cfg)
  iterator = iter(batches(one, 1, seed=0, train=True, prepare=prepare))
  assert len({next(iterator)["images"].tobytes() for _ in range(40)}) > 20
  held_out = [x["images"] for x in batches(one, 1, seed=0, train=False, prepare=prepare)]
  assert (held_out[0][0] == one[0]["images"][2:10, 2:10]).all()


def test_a_batch_that_is_filled_up_has_weight_for_its_images_only():
  data = images.load(ImageConfig())
  last = list(batches(data.splits["validation"], 100, seed=0, train=False))[-1]
  assert last["weights"].tolist() == [1.0] * 97 + [0.0] * 3


@pytest.mark.parametrize(
  ("source", "words"),
  [
    ("digit", "choose one of digits, tfds, folder, tar"),
    ("digits:8", "takes no argument"),
    ("folder:", "name a directory"),
    ("folder:/nowhere", "no such directory"),
    ("folder:{empty}", "a folder a class"),
    ("tar:{empty}", "no .tar"),
    ("tar:{tar}?classes=x", "whole number"),
    ("tar:{unlabelled}", "has no label"),
    ("tar:{broken}", "cannot be read"),
    ("tfds:nothing_of_that_name?dir={empty}", "no such dataset"),
  ],
)
def test_a_wrong_source_is_one_line(tmp_path, source, words):
  places = {name: tmp_path / name for name in ("empty", "tar", "unlabelled", "broken")}
  for place in places.values():
    place.mkdir()
  tar(places["tar"])
  with tarfile.open(places["unlabelled"] / "a.tar", "w") as out:
    out.addfile(tarfile.TarInfo("1.png"), io.BytesIO())
  (places["broken"] / "a.tar").write_bytes(b"x" * 2000)
  with pytest.raises(UserError) as error:
    images.load(ImageConfig(source.format(**places)))
  assert words in str(error.value)
  assert "\n" not in str(error.value)


def test_a_label_without_a_class_is_a_bad_record(tmp_path):
  data = images.load(ImageConfig(tar(tmp_path) + "?classes=2", max_bad_records=0))
  with pytest.raises(UserError, match=r"label 2 is not in 0 \.\. 1"):
    rows(data, "train")


@pytest.mark.parametrize("field", [{"size": 0}, {"channels": 2}, {"resize": 0.5}, {"max_bad_records": -1}])
def test_a_wrong_field_is_named(field):
  with pytest.raises(UserError, match=next(iter(field))):
    ImageConfig(**field)
