"""What the pages name and a reader has from elsewhere: small, in the very formats."""

import json
import pathlib
import pickle
import shutil
import zipfile

import jax
import numpy as np
from safetensors.numpy import load_file
import tokenizers

from research import config
from research.data import styles, text, tokenizer
from research.models import convert
from research.models.transformer import Transformer
from tests import small
from tests.data import test_images
from tests.models.images import GOLDENS

ROOT = pathlib.Path(__file__).parents[1]
CLASSES = 10  # of the small models
END = 299  # the id that ends a document, the last of the small tokenizer


def tokenizer_of_llamagen(folder: pathlib.Path) -> None:
  """vq_ds16_c2i.pt: for pictures of 8 pixels."""
  tensors = load_file(GOLDENS / "llamagen_vq" / "weights.safetensors")
  _torch_file(folder / "vq_ds16_c2i.pt", {"model": tensors})


def llamagen(folder: pathlib.Path) -> None:
  """c2i_L_384.pt: 16 tokens of 64, ten classes."""
  shutil.copy(GOLDENS / "llamagen_gpt_mha" / "c2i_tiny.pt", folder / "c2i_L_384.pt")


def imagenet(folder: pathlib.Path) -> None:
  """imagenet2012, prepared in the data_dir of TFDS: noise of 12 x 12."""
  test_images.tfds(folder / "tfds", "imagenet2012", {"train": 24, "validation": 10}, tuple(map(str, range(CLASSES))))


def inception(folder: pathlib.Path) -> None:
  """my_inception.py: a function of a reader's own."""
  (folder / "my_inception.py").write_text("def pool3(images):\n  return images.mean((1, 2), dtype='float64')\n")


def statistics(folder: pathlib.Path) -> None:
  """VIRTUAL_imagenet256_labeled.npz: mean and covariance of such features, beside the images."""
  images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
  features = images.mean((1, 2), dtype=np.float64)
  np.savez(
    folder / "VIRTUAL_imagenet256_labeled.npz", arr_0=images, mu=features.mean(0), sigma=np.cov(features, rowvar=False)
  )


def preferences(folder: pathlib.Path) -> None:
  """PAIRS.jsonl, and DIR with a Llama of the config's tiny size and its tokenizer."""
  pairs = list(styles.rows())[::4]
  (folder / "PAIRS.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
  cfg = config.load(f"{ROOT}/experiments/prefgames/configs/text.py:1b5,tiny")
  with small.use():
    model = Transformer(jax.random.key(0), cfg.model, "replicated")
    convert.export(model, folder / "DIR")
  learnt = tokenizer.bpe(text.corpus([(str(i), pair["chosen"].encode()) for i, pair in enumerate(pairs)]), END + 1)
  of_library = tokenizers.Tokenizer.from_str(learnt.model)
  of_library.add_special_tokens(["<|endoftext|>"])
  of_library.save(str(folder / "DIR" / "tokenizer.json"))


# by what a command says that needs it
DOWNLOADS = {
  "vq_ds16_c2i.pt": tokenizer_of_llamagen,
  "c2i_L_384.pt": llamagen,
  "tfds:imagenet2012": imagenet,
  "my_inception:": inception,
  "VIRTUAL_imagenet256_labeled.npz": statistics,
  "PAIRS.jsonl": preferences,
}


def _torch_file(path: pathlib.Path, tree: dict) -> None:
  """What torch.save writes of nested dictionaries of float32 arrays."""
  arrays: list[np.ndarray] = []
  string = lambda x: b"X" + len(x).to_bytes(4, "little") + x.encode()
  numbers = lambda xs: b"(" + b"".join(pickle.dumps(int(x), 2)[2:-1] for x in xs) + b"t"

  def program(x) -> bytes:
    if isinstance(x, dict):
      return b"}(" + b"".join(string(key) + program(value) for key, value in x.items()) + b"u"
    arrays.append(np.ascontiguousarray(x, np.float32))
    storage = b"(" + string("storage") + b"ctorch\nFloatStorage\n" + string(str(len(arrays) - 1)) + string("cpu")
    storage += pickle.dumps(x.size, 2)[2:-1] + b"tQ"
    layout = b"K\x00" + numbers(x.shape) + numbers(stride // 4 for stride in arrays[-1].strides)
    no_hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + layout + no_hooks + b"tR"

  with zipfile.ZipFile(path, "w") as out:
    out.writestr(f"{path.stem}/data.pkl", b"\x80\x02" + program(tree) + b".")
    out.writestr(f"{path.stem}/byteorder", "little")
    for i, array in enumerate(arrays):
      out.writestr(f"{path.stem}/data/{i}", array.tobytes())
    out.writestr(f"{path.stem}/version", "3\n")
