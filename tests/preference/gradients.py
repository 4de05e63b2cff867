"""What the tests of losses on preferences share."""

import jax
from jax import numpy as jnp
import numpy as np


def rows_and_grad(loss, logp, *args, **kwargs):
  """(rows [batch], gradient of their sum by logp)."""
  f = lambda logp: (lambda rows: (jnp.sum(rows), rows))(loss(logp, *args, **kwargs))
  grad, rows = jax.jit(jax.grad(f, has_aux=True))(jnp.asarray(logp))
  return np.asarray(rows), np.asarray(grad)
