"""What the tests of published weights share: the golden ones, copies of them with changes, and how they are refused."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from research.errors import UserError
from research.models import convert
from research.models.transformer import Transformer
from tests import small

GOLDENS = pathlib.Path(__file__).parent / "goldens"
Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.{}.self_attn.K"


def load(directory, **execution):
  return convert.load(directory, **{"precision": "float32", "layer_loop": "scan", **execution})


def golden(name):
  return np.load(GOLDENS / name / "expected.npz")


def directory(tmp_path, source="llama", settings=(), tensors=None, drop=()):
  """A copy of the golden weights with some entries of config.json and some tensors changed."""
  held = load_file(GOLDENS / source / "weights.safetensors")
  said = json.loads((GOLDENS / source / "config.json").read_text()) | dict(settings)
  tmp_path.mkdir(exist_ok=True)
  save_file({k: v for k, v in {**held, **(tensors or {})}.items() if k not in drop}, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in said.items() if k not in drop}))
  return tmp_path


def refused(path, *told, **settings):
  """Reading is refused in words that say all of `told`; returns the message's lines."""
  with pytest.raises(UserError) as e:
    convert.read(path, **settings)
  message = str(e.value)
  assert not [word for word in told if word not in message], message
  return message.splitlines()


def row(lines, key):
  """The cells of the row of a table of differences that starts with `key`."""
  (line,) = [line for line in lines if line.startswith(f"| {key} ")]
  return [cell.strip() for cell in line.strip("|").split("|")][1:]


@functools.cache
def on_one_device(mix=None, **changes):
  with small.use():
    return jax.jit(lambda key: Transformer(key, small.varied(**changes), mix=mix))(jax.random.key(3))


def abstract(mix=None, **changes):
  return jax.eval_shape(lambda key: Transformer(key, small.varied(**changes), mix=mix), jax.random.key(0))


def same(a, b):
  for x, y in zip(small.leaves(a), small.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)
