"""Which dtype for what: the one place that decides."""

import dataclasses

import jax
from jax import numpy as jnp

from research import mesh


@dataclasses.dataclass(frozen=True)
class Policy:
  """Dtypes of parameters, of matrix products and activations, and of reductions (norms, softmax, loss)."""

  params: jnp.dtype
  compute: jnp.dtype
  reduce: jnp.dtype

  def weight(self, w: jax.Array) -> jax.Array:
    """A stored parameter as it enters a product: cast, then gathered along `data`.

    The cast comes first so that the gather moves the smaller dtype.
    """
    return jax.reshard(w.astype(self.compute), mesh.gathered(jax.typeof(w).sharding.spec))


POLICIES = {
  "float32": Policy(jnp.float32, jnp.float32, jnp.float32),
  "bfloat16": Policy(jnp.float32, jnp.bfloat16, jnp.float32),
}
