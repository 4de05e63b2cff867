"""KV shifting: each key and value is a learned mix of the current and the previous token's."""

from flax import nnx
import jax
from jax import P
from jax import numpy as jnp

from research.kernels.dispatch import place
from research.mesh import Partition
from research.models.transformer import TransformerConfig
from research.nn.precision import POLICIES
from research.nn.token_shift import shift


class KVShift(nnx.Module):
  """k'_t = a1 k_t + a2 k_{t-1} and v'_t = b1 v_t + b2 v_{t-1}, with scalars of each key-value head.

  Xu, Wang & Chen, "KV Shifting Attention Enhances Language Modeling" (arXiv 2411.19574),
  equations 4 to 6; a mix for `research.nn.attention.Attention`, so it acts before the
  rotary embedding, as in the paper's appendix F. There is no previous token at the
  start of a row (the paper) or of a document (packing, which the paper leaves open).

  key, value: [kv_heads, 2]. Column 0 weighs the previous token (a2, b2), column 1 the
  current one (a1, b1): the order of the paper's listing, not of its equations.
  a1, b1 ~ U(0, 1), a2 = 1 - a1, b2 = 1 - b1; free after that.
  """

  looks_back = {"k": 1, "v": 1}

  def __init__(self, key: jax.Array, cfg: TransformerConfig, partition: Partition):
    policy = POLICIES[cfg.precision]

    def coefficients(key):
      now = jax.random.uniform(key, (cfg.kv_heads,), policy.params)
      return nnx.Param(jax.reshard(jnp.stack([1 - now, now], axis=1), partition.per_head))

    key_key, value_key = jax.random.split(key)
    self.key, self.value = coefficients(key_key), coefficients(value_key)

  def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None):
    """q [batch, length, heads, head_dim] as it is, k and v [batch, length, kv_heads, head_dim] mixed."""
    return q, mix(k, self.key[...], segment_ids), mix(v, self.value[...], segment_ids)


def mix(x: jax.Array, coefficients: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """coefficients[:, 1] x_t + coefficients[:, 0] x_{t-1} by head.

  x [batch, length, kv_heads, head_dim]; coefficients [kv_heads, 2], in whose dtype
  the sum is taken; identity coefficients (0, 1) return x bit for bit.
  """
  # a few numbers: every device has them all
  return _mix(x, place(coefficients, P(None, None)), segment_ids)


# The gradient is written out for the coefficients' sake: left to itself XLA sums their products in one
# scalar chain a head, and does the work of the rotary embedding's transpose once more for each sum.
@jax.custom_vjp
def _mix(x, coefficients, segment_ids):
  previous, current = jnp.split(coefficients, 2, axis=1)
  y = current * x.astype(coefficients.dtype) + previous * shift(x, segment_ids).astype(coefficients.dtype)
  return y.astype(x.dtype)


def _mix_forward(x, coefficients, segment_ids):
  return _mix(x, coefficients, segment_ids), (x, coefficients, segment_ids)


def _mix_backward(residuals, dy):
  x, coefficients, segment_ids = residuals
  previous, current = jnp.split(coefficients, 2, axis=1)
  dtype = coefficients.dtype
  following = jnp.pad(dy[:, 1:], [(0, 0), (0, 1), (0, 0), (0, 0)]).astype(dtype)  # x_t is the previous of t + 1
  if segment_ids is not None:
    same = jnp.pad(segment_ids[:, 1:] == segment_ids[:, :-1], [(0, 0), (0, 1)])
    following = jnp.where(same[:, :, None, None], following, 0)
  dy = dy.astype(dtype)
  sums = [jnp.sum(z * x.astype(dtype), axis=(0, 1)) for z in (following, dy)]
  sums = jax.lax.optimization_barrier([place(z, P(None, None)) for z in sums])  # [kv_heads, head_dim] each
  dcoefficients = jnp.stack([jnp.sum(z, axis=-1) for z in sums], axis=1)
  return (current * dy + previous * following).astype(x.dtype), dcoefficients, None


_mix.defvjp(_mix_forward, _mix_backward)
