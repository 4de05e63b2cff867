"""Shapes that models really attend with; shared by tests, benchmarks and ahead-of-time compiles."""

import functools
import math
from typing import NamedTuple

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes
import jax.numpy as jnp

from research.kernels.attention import splash
from research.kernels.program import Program


class Case(NamedTuple):
  batch: int
  length: int
  heads: int
  kv_heads: int
  head_dim: int
  dtype: str


# What one device of a typical run holds.
CASES = {
  "nano": Case(16, 256, 4, 4, 64, "float32"),
  "lm_1.5b": Case(2, 2048, 16, 16, 128, "bfloat16"),
  "gpt2_small": Case(4, 1024, 12, 12, 64, "bfloat16"),
  "llama3_8b_shard": Case(1, 8192, 8, 2, 128, "bfloat16"),
  "image_tokens": Case(4, 1023, 16, 16, 64, "bfloat16"),
}


def programs(case: Case) -> dict[str, Program]:
  """Forward and backward on one TPU: with our blocks, and with those that splash attention takes by itself."""

  def gradients(q, k, v, segment_ids, blocks=None):
    call = functools.partial(splash.attention, scale=1 / math.sqrt(case.head_dim), blocks=blocks)
    return jax.grad(lambda *qkv: call(*qkv, segment_ids).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)

  of = lambda heads: jax.ShapeDtypeStruct((case.batch, case.length, heads, case.head_dim), case.dtype)
  ids = jax.ShapeDtypeStruct((case.batch, case.length), jnp.int32)
  operands = (of(case.heads), of(case.kv_heads), of(case.kv_heads), ids)
  share = lambda block: (1 + block / (case.length + -case.length % splash.LANES)) / 2
  ours = splash.block(case.length + -case.length % splash.LANES)
  default = BlockSizes.get_default()
  return {
    "ours": Program(gradients, operands, share(ours)),
    "splash, default blocks": Program(functools.partial(gradients, blocks=default), operands, share(default.block_q)),
  }
