"""The library under every experiment. Nothing in here knows the name of a paper."""

from flax import nnx

# Modules are plain pytrees under jax.jit, jax.grad and jax.lax.scan ("tree mode").
# flax still defaults to graph mode, so this stands where no import can miss it.
nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
