"""Codes of images: what the command writes, that it goes on where it was killed, and the rows read from it."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from research import data, image_tokenizers
from research.data import codes, images
from research.data.images import ImageConfig
from research.errors import UserError
from research.tools import codes as tool
from tests import small
from tests.data.test_images import folder

ROOT = pathlib.Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "models" / "goldens" / "images"
VQ, VQVAE = GOLDENS / "llamagen_vq", GOLDENS / "var_vqvae"
COUNT = 40

# Kills itself with an image in a shard that is not whole.
KILLED = """
import os, signal
from research.data import codes
add, calls = codes.Writer.add, []
def killed(*args):
  calls.append(args)
  if len(calls) == 20:
    os.kill(os.getpid(), signal.SIGKILL)
  return add(*args)
codes.Writer.add = killed
from research.tools import codes as tool
tool.main()
"""


def arguments(source, out, *more):
  given = ["--source", source, "--tokenizer", str(VQ), "--size=8", "--resize=1.25", "--views=ten", "--batch=5"]
  return [*given, "--shard_images=7", f"--out={out}", *more]


def extract(monkeypatch, *argv):
  monkeypatch.setattr(sys, "argv", ["codes", *argv])
  tool.main()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  root = tmp_path_factory.mktemp("pictures")
  source = folder(root / "train", COUNT)
  folder(root / "val", 12)
  broken = root / "train" / "ant" / "9.png"
  broken.write_bytes(broken.read_bytes()[:70])
  return source.removesuffix("/train")


@pytest.fixture(scope="module")
def written(pictures, tmp_path_factory):
  root = tmp_path_factory.mktemp("codes")
  with pytest.MonkeyPatch.context() as patch:
    extract(patch, *arguments(pictures, root))
  return root


def files(root):
  return {path.name: path.read_bytes() for path in root.iterdir() if path.name != ".lock"}


def test_rows_hold_the_codes_of_every_view_and_the_label(written, pictures):
  cfg = ImageConfig(pictures, size=8, channels=3, resize=1.25)
  of = images.load(cfg).splits["train"]
  found = [row for i in range(COUNT) if (row := of.read(i)) is not None]
  rows = codes.Codes(f"codes:{written}", "train")
  assert len(rows) == len(found) == COUNT - 1
  with small.use():
    tokenizer = image_tokenizers.load(VQ)
    encode = lambda pixels: np.asarray(image_tokenizers.encode_pixels(tokenizer, pixels))
    for i in (0, 8, COUNT - 2):
      crops = images.ten_crops(found[i]["images"], 8)
      assert rows[i]["views"].shape == (10, 16)
      assert rows[i]["labels"] == found[i]["labels"]
      assert (rows[i]["views"][0] == encode(crops)[4]).all()
      assert sorted(map(bytes, rows[i]["views"])) == sorted(map(bytes, encode(crops)))


def test_validation_images_are_encoded_once_from_their_middle(written):
  held_out = codes.Codes(f"codes:{written}", "validation")
  assert len(held_out) == 12
  assert held_out[3]["views"].shape == (1, 16)


def test_what_cannot_be_read_is_named_and_left_out(written, pictures):
  about = codes.info(f"codes:{written}")
  assert [pathlib.Path(name).name for name in about["bad_records"]] == ["9.png"]
  assert about["images"] == {"train": COUNT - 1, "validation": 12}


def test_a_killed_extraction_goes_on_and_ends_with_the_same_files(written, pictures, tmp_path, monkeypatch):
  given = arguments(pictures, tmp_path)
  killed = subprocess.run([sys.executable, "-c", KILLED, *given], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
  assert killed.returncode == -9
  about = json.loads((tmp_path / "manifest.json").read_text())
  assert not about["complete"]
  assert len(about["splits"]["train"]["shards"]) == 2
  with pytest.raises(UserError, match=r"is not finished; run research\.tools\.codes on it again"):
    codes.Codes(f"codes:{tmp_path}", "train")
  extract(monkeypatch, *given)
  assert files(tmp_path) == files(written)


@pytest.mark.parametrize(
  ("more", "words"),
  [
    (["--resize=1"], r"resize=1\.0 \(was 1\.25\)"),
    (["--tokenizer", str(VQVAE)], "tokenizer="),
    (["--views=centre"], r"views=centre \(was ten\)"),
    (["--source=digits"], "source=digits"),
  ],
)
def test_other_settings_than_those_of_the_shards_are_one_line(written, pictures, monkeypatch, more, words):
  with pytest.raises(UserError, match=f"holds shards made with other settings.*{words}.*use another --out") as error:
    extract(monkeypatch, *arguments(pictures, written, *more))
  assert "\n" not in str(error.value)


def test_images_added_to_the_source_are_noticed(written, pictures, monkeypatch, tmp_path):
  shutil.copytree(pictures.partition(":")[2], tmp_path / "pictures")
  folder(tmp_path / "pictures" / "train", COUNT + 1)
  shutil.copytree(written, tmp_path / "codes")
  about = json.loads((tmp_path / "codes" / "manifest.json").read_text())
  about["settings"]["source"] = f"folder:{tmp_path / 'pictures'}"
  (tmp_path / "codes" / "manifest.json").write_text(json.dumps(about))
  with pytest.raises(UserError, match="train_names=.*was"):
    extract(monkeypatch, *arguments(f"folder:{tmp_path / 'pictures'}", tmp_path / "codes"))


@pytest.mark.parametrize(
  ("more", "words"),
  [
    (["--size=9"], "image=9x9: height and width must be multiples of 2"),
    (["--tokenizer", str(GOLDENS / "llamagen_gpt_mha")], "give the tokenizer's weights"),
    (["--tokenizer=/nowhere.pt"], r"tokenizer=/nowhere\.pt: no such file"),
    (["--source=folder:/nowhere"], "no such directory"),
    (["--batch=0"], "batch=0"),
    (["--scales=1,x"], "scales"),
    (["--max_bad_records=0"], "max_bad_records=0.*9.png is bad image number 1"),
  ],
)
def test_a_wrong_argument_is_one_line(pictures, tmp_path, monkeypatch, more, words):
  with pytest.raises(UserError, match=words) as error:
    extract(monkeypatch, *arguments(pictures, tmp_path, *more))
  assert "\n" not in str(error.value)


def stream(written, seed=0, shard=(0, 1)):
  rows = codes.Codes(f"codes:{written}", "train")
  return data.batches(rows, 8, seed=seed, shard=shard, train=True, prepare=codes.pick)


def test_every_epoch_draws_a_view_of_every_image(written):
  rows, iterator = codes.Codes(f"codes:{written}", "train"), iter(stream(written))
  views = {bytes(view): (i, n) for i in range(len(rows)) for n, view in enumerate(rows[i]["views"])}
  drawn = [bytes(codes) for _ in range(6 * len(rows) // 8) for codes in next(iterator)["codes"]]
  seen = [views[of] for of in drawn]
  of_first = [i for i, _ in seen[: len(rows)]]
  assert len(set(of_first)) > 0.9 * len(rows)  # codes of two images may happen to be the same
  assert len({n for _, n in seen}) == 10


def test_a_stream_resumes_exactly_on_any_number_of_processes(written):
  iterator = iter(stream(written))
  for _ in range(3):
    next(iterator)
  state, want = iterator.get_state(), next(iterator)
  parts = []
  for index in range(2):
    again = iter(stream(written, shard=(index, 2)))
    again.set_state(state)
    parts.append(next(again))
  for name in want:
    np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), want[name])


def test_a_damaged_shard_is_named(written, tmp_path):
  shutil.copytree(written, tmp_path / "codes")
  path = tmp_path / "codes" / "train-00001.array_record"
  path.write_bytes(bytes(path.stat().st_size))
  with pytest.raises(UserError, match=r"train-00001\.array_record is damaged: .*research\.tools\.codes"):
    codes.Codes(f"codes:{tmp_path / 'codes'}", "train")[8]


def test_a_tokenizers_identity_is_that_of_its_weights():
  with small.use():
    first = image_tokenizers.load(VQVAE)
    about = image_tokenizers.identity(first)
    assert about == image_tokenizers.identity(image_tokenizers.load(VQVAE))
    book = first.codebook[...]
    first.codebook[...] = book.at[0, 0].add(1e-6)
    assert image_tokenizers.identity(first)["sha256"] != about["sha256"]
  assert {name: about[name] for name in ("kind", "vocab", "scales")} == {
    "kind": "VQVAE",
    "vocab": 32,
    "scales": [1, 2, 3, 4],
  }
