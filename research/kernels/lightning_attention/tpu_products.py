"""The products of a chunk, as the matrix units of a TPU take them.

What would be rounded to bfloat16 is split in two, its upper 16 bits and the rest: scores, scaled
values and the state then carry 16 bits, and the result is as exact as its own rounding. The
halves stand side by side along the contraction where a chunk of 64 fills half a matrix unit only.

Two heads of 64 share the lanes of a register, and are taken as one of 128: their states are
the blocks of a diagonal, and their scores stand side by side. A NaN of one reaches the other.

`s` is the shape of a kernel, of pallas_tpu.py or pallas_tpu_gated.py.
"""

import jax
import jax.numpy as jnp

LANES = 128


def iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def halves(x):
  """float32 -> (its upper 16 bits, the rest). Both float32: to go there and back through bfloat16 costs packing."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16))
  high = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return high, x - high


def own(x, a: int):
  """Head `a` of two that share the lanes of x; zeros in the other's."""
  return jnp.where((iota(x.shape, 1) < LANES // 2) == (a == 0), x, jnp.zeros_like(x))


def stacked(s, x):
  """The rows that the columns of a unit's scores stand for: each once a half of the scores, or of each head its own."""
  return jnp.concatenate([x] * s.parts if s.joint == 1 else [own(x, 0), own(x, 1)], axis=0)


def dot(a, b, contract):
  """a b in float32, contracting a's and b's axes `contract`."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  numbers = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def split(s, x):
  """float32 as the operands of the matrix units that add up to it."""
  return [x] if s.parts == 1 else [half.astype(s.dtype) for half in halves(x)]


def split_dot(s, wide, narrow, contract):
  """`wide` float32 times `narrow`: the halves one after the other along the contraction."""
  if s.parts == 2:
    wide = jnp.concatenate(halves(wide), axis=contract[0]).astype(s.dtype)
  return dot(wide, jnp.concatenate([narrow] * s.parts, axis=contract[1]), contract)


def wide_dot(s, narrow, wide, contract):
  """`narrow` times `wide` float32, a product for each half."""
  return sum(dot(narrow, half, contract) for half in split(s, wide))


def write_scores(s, ref, a, b, f):
  """Leaves in `ref` [rows of a, rows of b] times the powers within the chunk, for `scores_dot`."""
  scores = dot(a, stacked(s, b), (1, 1)) * f.within
  if ref.shape[0] == s.parts:
    park(ref, scores)
  else:
    ref[0] = jnp.where(iota(scores.shape, 1) < s.chunk, *halves(scores)).astype(s.dtype)


def scores_dot(s, ref, x):
  """The scores in `ref` times the rows x of their columns."""
  rows = stacked(s, x)
  return sum(dot(ref[part], rows, (1, 0)) for part in range(ref.shape[0]))


def park(ref, x):
  """float32 as the matrix units take it: [parts, ...]."""
  for part, half in enumerate([x] if ref.dtype == jnp.float32 else halves(x)):
    ref[part] = half.astype(ref.dtype)


def state_dot(x, ref, contract):
  """x times the state parked in `ref`."""
  return sum(dot(x, ref[part], contract) for part in range(ref.shape[0]))


def outer(s, narrow, wide):
  """narrow^T wide, of every head with itself; wide is float32, its halves one after the other."""
  if s.parts == 2:
    wide = jnp.concatenate(halves(wide), axis=0).astype(s.dtype)
  product = dot(jnp.concatenate([narrow] * s.parts, axis=0), wide, (0, 0))
  if s.joint == 1:
    return product
  return jnp.concatenate([own(product[: LANES // 2], 0), own(product[LANES // 2 :], 1)], axis=0)
