"""The hash of an array sees every bit of it, and not how it is cut."""

import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest

from research.checkpoint import fingerprints
from research.mesh import MeshConfig, make_mesh


def reference_hash(array: np.ndarray) -> str:
  """The hash's definition, in Python integers."""

  def mix(x: int, first: int, second: int) -> int:
    x = (x ^ x >> 16) * first % 2**32
    x = (x ^ x >> 13) * second % 2**32
    return x ^ x >> 16

  array = np.ascontiguousarray(array)
  words = array.view(f"uint{8 * min(array.dtype.itemsize, 4)}").ravel().tolist()
  sums = []
  for odd in ((0x85EBCA6B, 0xC2B2AE35), (0x7FEB352D, 0x846CA68B)):
    sums.append(sum(mix(word ^ mix(place, *odd), *odd) for place, word in enumerate(words)) % 2**32)
  return "".join(f"{part:08x}" for part in sums)


DTYPES = ["int8", "uint16", "int32", "uint32", "int64", "bfloat16", "float16", "float32", "float64", "float8_e4m3fn"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_bit_changes_the_hash(dtype):
  dtype = jnp.dtype(dtype)
  raw = np.random.default_rng(0).integers(0, 256, size=4 * dtype.itemsize, dtype=np.uint8)
  variants = {"unchanged": raw.view(dtype)}
  for bit in range(8 * raw.size):
    flipped = raw.copy()
    flipped[bit // 8] ^= 1 << bit % 8
    variants[str(bit)] = flipped.view(dtype)
  with jax.enable_x64(True):
    hashes = fingerprints({name: jnp.asarray(array) for name, array in variants.items()})
  assert len(set(hashes.values())) == len(variants)
  base = hashes.pop("unchanged")
  assert base == reference_hash(raw.view(dtype))
  halves = {(h[:8] == base[:8]) or (h[8:] == base[8:]) for h in hashes.values()}
  assert halves == {False}  # either half alone would do


def test_the_hash_sees_swaps_and_zeros_and_flags():
  x = np.arange(64, dtype=np.float32)
  swaps = {f"{i},{j}": x.copy() for i in range(8) for j in range(i)}
  for name, array in swaps.items():
    i, j = map(int, name.split(","))
    array[[i, j]] = array[[j, i]]
  hashes = fingerprints({"x": jnp.asarray(x)} | {name: jnp.asarray(array) for name, array in swaps.items()})
  assert len(set(hashes.values())) == len(swaps) + 1
  flags = [np.array([a, b]) for a in (False, True) for b in (False, True)]
  assert len(set(fingerprints({str(i): jnp.asarray(flag) for i, flag in enumerate(flags)}).values())) == 4
  assert fingerprints({"-": jnp.float32(-0.0)}) != fingerprints({"-": jnp.float32(0.0)})
  assert fingerprints({"empty": jnp.zeros((0, 3))}) == {"empty": "0" * 16}


SPECS = [P(), P("data"), P("model", "data"), P(("data", "model")), P(None, "model"), P(None, None, ("model", "data"))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "bool"])
def test_the_hash_does_not_depend_on_the_sharding(dtype):
  with jax.enable_x64(True):
    array = np.random.default_rng(0).normal(size=(8, 4, 4)).astype(jnp.dtype(dtype))
    mesh = make_mesh(MeshConfig(model=2))
    cut = {str(spec): jax.device_put(array, jax.NamedSharding(mesh, spec)) for spec in SPECS}
    hashes = set(fingerprints(cut).values())
    with jax.set_mesh(mesh):
      hashes |= set(fingerprints(cut | {"inside": jnp.asarray(array)}).values())
  assert hashes == {reference_hash(array)}
