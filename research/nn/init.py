"""How weights start."""

import jax


def fan_in(key: jax.Array, shape, fan: int, dtype, spec: jax.P, scale: float = 1.0) -> jax.Array:
  """Normal weights of standard deviation scale / sqrt(fan), made where `spec` puts them."""
  init = jax.nn.initializers.normal(scale * fan**-0.5)
  return init(key, shape, dtype, out_sharding=spec)
