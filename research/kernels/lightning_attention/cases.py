"""Shapes that models really attend with; shared by tests, benchmarks and ahead-of-time compiles."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.kernels.attention import splash
from research.kernels.lightning_attention import pallas_tpu, pallas_tpu_gated
from research.kernels.program import Program


class Case(NamedTuple):
  batch: int
  length: int
  heads: int
  d_k: int
  d_v: int
  dtype: str


# What one device of a typical run holds.
CASES = {
  "nano": Case(4, 256, 4, 64, 64, "float32"),
  "tnl_385m": Case(4, 2048, 8, 128, 128, "bfloat16"),
  "tnl_385m_lrpe": Case(4, 2048, 8, 256, 128, "bfloat16"),  # the first layer: phases double d_k
  "tnl_7b_shard": Case(1, 8192, 8, 128, 128, "bfloat16"),
  "nanotnl": Case(4, 1024, 12, 64, 64, "bfloat16"),
}


def programs(case: Case) -> dict[str, Program]:
  """Forward and backward on one TPU: alone, as a layer has it, and softmax attention over the same rows.

  The work of the last grows with the square of the length.
  """

  def gradients(q, k, v, decay):
    return jax.value_and_grad(lambda *qkv: _sum(pallas_tpu.attention(*qkv, decay)[0]), argnums=(0, 1, 2))(q, k, v)

  def layer(qkvu, decay, theta, positions):
    def f(qkvu, theta):
      out, squares, _ = pallas_tpu_gated.attention(qkvu, decay, theta, positions, None, None, activation="silu")
      return _sum(out) + _sum(squares)

    return jax.value_and_grad(f, argnums=(0,) if theta is None else (0, 1))(qkvu, theta)

  def softmax(q, k, v):
    call = functools.partial(splash.attention, scale=1 / math.sqrt(case.d_k))
    return jax.grad(lambda *qkv: _sum(call(*qkv)), argnums=(0, 1, 2))(q, k, v)

  of = lambda d: jax.ShapeDtypeStruct((case.batch, case.length, case.heads, d), case.dtype)
  decay = jax.ShapeDtypeStruct((case.heads,), jnp.float32)
  programs = {"ours": Program(gradients, (of(case.d_k), of(case.d_k), of(case.d_v), decay))}
  qkvu = jax.ShapeDtypeStruct((case.batch, case.length, case.heads, 4, case.d_v), case.dtype)
  theta = jax.ShapeDtypeStruct((case.batch, case.heads, case.d_v), jnp.float32) if case.d_k != case.d_v else None
  positions = jax.ShapeDtypeStruct((case.batch, case.length), jnp.int32)
  programs["gated"] = Program(layer, (qkvu, decay, theta, positions))
  if case.d_k == case.d_v:
    share = (1 + splash.block(case.length) / case.length) / 2
    programs["splash"] = Program(softmax, (of(case.d_k), of(case.d_k), of(case.d_v)), share)
  return programs


def _sum(x):
  return x.astype(jnp.float32).sum()
