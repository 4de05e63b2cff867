"""FLOPs are those of the products that a function's trace holds."""

import jax
from jax import numpy as jnp

from research.flops import products


def test_a_product_counts_two_operations_for_each_number_that_it_adds():
  a, b = jnp.zeros((3, 4)), jnp.zeros((4, 5))
  assert products(lambda a, b: a @ b + 1, a, b) == 2 * 3 * 4 * 5
  batch = jnp.zeros((7, 3, 4))
  assert products(lambda a, b: jnp.einsum("nij,jk->nik", a, b), batch, b) == 2 * 7 * 3 * 4 * 5


def test_a_convolution_counts_its_kernel_at_every_place():
  x, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 16))
  f = lambda x, k: jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  assert products(f, x, kernel) == 2 * 2 * 4 * 4 * 16 * 3 * 3 * 3


def test_what_is_nested_counts_as_often_as_it_runs():
  a = jnp.zeros((4, 4))
  body = lambda x, _: (jax.jit(lambda x: x @ a)(x), None)
  assert products(lambda x: jax.lax.scan(body, x, None, length=5)[0], a) == 5 * 2 * 4**3
  choice = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ a @ a, lambda x: x @ a, x)
  assert products(choice, a) == 2 * 2 * 4**3
