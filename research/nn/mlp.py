"""Feed-forward layers."""

from collections.abc import Callable

from flax import nnx
import jax
from jax import P
from jax import numpy as jnp

from research.mesh import HIDDEN, Partition
from research.nn.init import fan_in
from research.nn.precision import Policy


class GLU(nnx.Module):
  """down(activation(gate(x)) * up(x)) (Shazeer, 2020, arXiv 2002.05202); gate and up are one matrix [width, 2, hidden].

  SwiGLU with silu; without an activation the SGLU of TransNormerLLM (arXiv 2307.14995, equation 12).
  """

  def __init__(
    self,
    key: jax.Array,
    *,
    width: int,
    hidden: int,
    activation: Callable[[jax.Array], jax.Array],
    out_scale: float,
    partition: Partition,
    policy: Policy,
  ):
    up_key, down_key = jax.random.split(key)
    self.up = nnx.Param(fan_in(up_key, (width, 2, hidden), width, policy.params, partition.up), matrix=((-3,), (-1,)))
    self.down = nnx.Param(
      fan_in(down_key, (hidden, width), hidden, policy.params, partition.down, out_scale), matrix=((-2,), (-1,))
    )
    self.activation, self.policy = activation, policy

  def __call__(self, x: jax.Array) -> jax.Array:
    """x [batch, length, width] -> [batch, length, width]."""
    y = jnp.einsum("btd,dcf->btcf", x, self.policy.weight(self.up[...]))
    gate, up = jnp.split(y, 2, axis=2)  # not indexing: its transpose is one concatenation instead of padded sums
    y = (self.activation(gate) * up)[:, :, 0]
    return jnp.einsum("btf,fd->btd", y, self.policy.weight(self.down[...]), out_sharding=HIDDEN)


class MLP(nnx.Module):
  """down(activation(up(x))), both with a bias. Weights start at the standard deviation 1 / sqrt(fan)."""

  def __init__(
    self,
    key: jax.Array,
    *,
    width: int,
    hidden: int,
    activation: Callable[[jax.Array], jax.Array],
    fan: int,
    out_scale: float,
    partition: Partition,
    policy: Policy,
  ):
    up_key, down_key = jax.random.split(key)
    data, _, model = partition.up
    up, down = fan_in(up_key, (width, hidden), fan, policy.params, P(data, model)), (hidden, width)
    self.up = nnx.Param(up, matrix=((-2,), (-1,)))
    self.up_bias = nnx.Param(jnp.zeros(hidden, policy.params, out_sharding=P(model)))
    self.down = nnx.Param(fan_in(down_key, down, fan, policy.params, partition.down, out_scale), matrix=((-2,), (-1,)))
    self.down_bias = nnx.Param(jnp.zeros(width, policy.params, out_sharding=partition.vector))
    self.activation, self.policy = activation, policy

  def __call__(self, x: jax.Array) -> jax.Array:
    """x [batch, length, width] -> [batch, length, width]."""
    weight = self.policy.weight
    y = self.activation(jnp.einsum("btd,df->btf", x, weight(self.up[...])) + weight(self.up_bias[...]))
    y = jnp.einsum("btf,fd->btd", y, weight(self.down[...]), out_sharding=HIDDEN)
    return y + weight(self.down_bias[...])
