"""Shapes that models really attend with; shared by tests, benchmarks and ahead-of-time compiles."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.kernels.attention import splash
from research.kernels.lightning_attention import pallas_tpu
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
  """Forward and backward on one TPU, and softmax attention over the same rows, whose work grows with their square."""

  def gradients(q, k, v, decay):
    return jax.value_and_grad(lambda *qkv: _sum(pallas_tpu.attention(*qkv, decay)[0]), argnums=(0, 1, 2))(q, k, v)

  def softmax(q, k, v):
    call = functools.partial(splash.attention, scale=1 / math.sqrt(case.d_k))
    return jax.grad(lambda *qkv: _sum(call(*qkv)), argnums=(0, 1, 2))(q, k, v)

  of = lambda d: jax.ShapeDtypeStruct((case.batch, case.length, case.heads, d), case.dtype)
  decay = jax.ShapeDtypeStruct((case.heads,), jnp.float32)
  programs = {"ours": Program(gradients, (of(case.d_k), of(case.d_k), of(case.d_v), decay))}
  if case.d_k == case.d_v:
    share = (1 + splash.block(case.length) / case.length) / 2
    programs["splash"] = Program(softmax, (of(case.d_k), of(case.d_k), of(case.d_v)), share)
  return programs


def _sum(x):
  return x.astype(jnp.float32).sum()
