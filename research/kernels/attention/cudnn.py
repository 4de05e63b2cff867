"""cuDNN's fused attention on NVIDIA GPUs, through jax.nn."""

import jax
import jax.numpy as jnp

from research.kernels import dispatch


def obstacle(q, segment_ids) -> str | None:
  """Why this cannot run the call; None if it can."""
  if dispatch.platform() != "gpu":
    return f"cuDNN needs a GPU, and this runs on {dispatch.platform()}"
  if jax.default_backend() != "gpu":
    return "cuDNN is looked for where a program is traced, and there is no GPU here"
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"cuDNN attends in bfloat16 or float16, not {q.dtype}"
  if q.shape[3] % 8 or q.shape[3] > 128:
    return f"cuDNN needs a head_dim that is a multiple of 8 up to 128, not {q.shape[3]}"
  if segment_ids is not None and q.shape[1] % 2:
    return f"cuDNN needs an even length with segment_ids, not {q.shape[1]}"
  return None


def attention(q_bthd, k_bskd, v_bskd, segment_ids=None, *, scale):
  """As `api.attention`. Segments cost a [batch, 1, length, length] mask; plain causal rows cost none."""
  mask = None if segment_ids is None else (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
  return jax.nn.dot_product_attention(
    q_bthd, k_bskd, v_bskd, mask=mask, is_causal=True, scale=scale, implementation="cudnn"
  )
