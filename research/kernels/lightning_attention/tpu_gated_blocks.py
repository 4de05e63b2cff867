"""How the gated kernels cut their operands: what a grid step holds, how much of it fits, and what it costs."""

import math
from typing import NamedTuple

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from research.kernels.lightning_attention import pallas_tpu as tpu
from research.kernels.lightning_attention.tpu_products import LANES

BUFFERS = 6 * 2**20  # bytes of VMEM for blocks


class Shape(NamedTuple):
  """What a kernel is made for; all but the last three as in pallas_tpu.py, where heads that share lanes are not one."""

  length: int
  group: int
  d_k: int
  d_v: int
  block: int
  chunk: int
  packed: bool
  dtype: jnp.dtype
  fields: int  # 4: q, k, v, u; 3 without the gate
  activation: str
  phased: bool

  @property
  def ragged(self) -> bool:
    return self.length % self.block != 0

  @property
  def d(self) -> int:
    return self.d_v

  @property
  def joint(self) -> int:
    return 1

  @property
  def parts(self) -> int:
    return 1 if self.dtype == jnp.float32 else 2

  @property
  def chunks(self) -> range:
    return range(self.block // self.chunk)


def shape_of(x, theta, runs, activation, block) -> Shape:
  length, heads, fields, d = x.shape[1:]
  group = LANES // math.gcd(LANES, d)
  group = group if heads % group == 0 else heads
  d_k = d if theta is None else 2 * d
  s = Shape(length, group, d_k, d, block, tpu.CHUNK, runs is not None, x.dtype, fields, activation, theta is not None)
  room = BUFFERS // 2 if x.dtype == jnp.float32 else BUFFERS  # its products spill more
  while block > LANES and block * bytes_a_token(s, x.dtype) > room:
    block //= 2
  blocks = pl.cdiv(length, block)  # of one size, as far as lanes allow
  return s._replace(block=LANES * pl.cdiv(length, LANES * blocks))


def bytes_a_token(s: Shape, dtype) -> int:
  """VMEM of the backward kernel's blocks, each there twice, and of the chunks' states."""
  return 2 * s.group * (2 * s.fields + 1) * s.d * jnp.dtype(dtype).itemsize + 4 * s.group * s.d_k * s.d_v // s.chunk


class Blocks(NamedTuple):
  """What a grid step holds of each array."""

  fused: pl.BlockSpec  # [batch, length, heads * fields * d]
  out: pl.BlockSpec  # [batch, length, heads * d]
  numbers: pl.BlockSpec  # [batch, heads, 1, length]
  tokens: pl.BlockSpec  # [batch, 1, length]
  state: pl.BlockSpec  # [batch, heads, d_k, d_v]
  kept: pl.BlockSpec  # [batch, blocks, heads, d_k, d_v]
  theta: pl.BlockSpec  # [batch, groups, group, d]


def blocks_of(s: Shape, at) -> Blocks:
  """at(j): the block of tokens of step j."""
  rows = lambda width: pl.BlockSpec((1, s.block, s.group * width), lambda b, g, j: (b, at(j), g))
  return Blocks(
    fused=rows(s.fields * s.d),
    out=rows(s.d),
    numbers=pl.BlockSpec((1, s.group, 1, s.block), lambda b, g, j: (b, g, 0, at(j))),
    tokens=pl.BlockSpec((1, 1, s.block), lambda b, g, j: (b, 0, at(j))),
    state=pl.BlockSpec((1, s.group, s.d_k, s.d_v), lambda b, g, j: (b, g, 0, 0)),
    kept=pl.BlockSpec((1, 1, s.group, s.d_k, s.d_v), lambda b, g, j: (b, at(j), g, 0, 0)),
    theta=pl.BlockSpec((1, 1, s.group, s.d), lambda b, g, j: (b, g, 0, 0)),
  )


def scratch(s: Shape):
  """By head: the state; powers of the decay within a chunk, entering and leaving it."""
  powers = [pltpu.VMEM((s.group, s.chunk, width), jnp.float32) for width in (s.chunk, LANES, LANES)]
  return [pltpu.VMEM((s.group, s.d_k, s.d_v), jnp.float32), *powers]


def cost(s: Shape, rows: int, operands, results, within: int, states: int) -> pl.CostEstimate:
  """within, states: products of a chunk with itself and with a state, each of half d_k and half d_v."""
  flops = rows * s.length * (within * s.chunk * (s.d_k + s.d_v) + states * 2 * s.d_k * s.d_v)
  moved = sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in (*operands, *results))
  transcendentals = 2 * rows * s.length * s.d * (1 + s.phased)
  return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=transcendentals)
