"""Causal attention on TPUs: JAX's splash kernel (flash attention over the blocks the mask leaves)."""

import math

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
import jax.numpy as jnp

from research.kernels import dispatch

LANES = 128


def obstacle(q) -> str | None:
  """Why this cannot run the call; None if it can."""
  if dispatch.platform() != "tpu":
    return f"splash attention needs a TPU, and this runs on {dispatch.platform()}"
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    return f"splash attention takes bfloat16 or float32, not {q.dtype}"
  if q.shape[1] < LANES:
    return f"splash attention works in blocks of {LANES}, and the length is {q.shape[1]}"
  return None


def attention(q_bthd, k_bskd, v_bskd, segment_ids=None, *, scale, interpret=False, blocks=None):
  """As `api.attention`, for lengths from 128; other than multiples of 128 are padded.

  Inside a shard_map when there is a mesh: the compiler cannot partition the kernel.
  `blocks`: other block sizes than ours.
  """
  length, heads = q_bthd.shape[1:3]
  # Padding stands after every real position, so causality alone hides it.
  pad = -length % LANES
  q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q_bthd * scale, k_bskd, v_bskd))
  segments = None
  if segment_ids is not None:
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)))
    segments = kernel_lib.SegmentIds(segment_ids, segment_ids)
  mask = mask_lib.MultiHeadMask([mask_lib.CausalMask((length + pad, length + pad))] * heads)
  blocks = blocks or _block_sizes(length + pad)
  kernel = kernel_lib.make_splash_mha_single_device(mask, block_sizes=blocks, interpret=interpret)
  return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)[:, :length]


def flops(kernel: str, shapes: list[tuple[int, ...]]) -> float | None:
  """What a compiled splash kernel computes, by its name in the program and its operands' shapes; None for others.

  Blocks above the diagonal are skipped, those on it are whole. A block costs two products
  forward (scores, output), three in dq (scores again, dp, dq), four in dkv (scores again, dv, dp, dk).
  """
  products = next((n for part, n in (("_fwd", 2), ("_dq", 3), ("_dkv", 4)) if f"splash_mha{part}" in kernel), None)
  if products is None:
    return None
  # q is the largest operand: [batch, heads, length, head_dim], or without a batch of one
  *several, length, head_dim = max(shapes, key=math.prod)
  size = block(length)
  blocks = (length // size) * (length // size + 1) // 2
  return 2.0 * products * math.prod(several) * blocks * size * size * head_dim


def block(length: int) -> int:
  """The block of queries, and of keys, for rows of `length`."""
  return next(size for size in (512, 384, 256, 128) if length % size == 0)


def _block_sizes(length: int) -> kernel_lib.BlockSizes:
  size = block(length)
  return kernel_lib.BlockSizes(
    block_q=size,
    block_kv=size,
    block_kv_compute=size,
    block_q_dkv=size,
    block_kv_dkv=size,
    block_kv_dkv_compute=size,
    block_q_dq=size,
    block_kv_dq=size,
  )
