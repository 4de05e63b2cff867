"""The paper's ablations and the peers of KV shifting, each a mix for `research.nn.attention.Attention`.

All of them are causal sums over the last few rows, zero before a row or a document
starts; they differ in what is summed, in who has a coefficient of its own, and in what
the coefficients may be. Ablations: arXiv 2411.19574, sections 4.6 and 4.7, appendix J.
"""

from collections.abc import Callable
import functools

from flax import nnx
import jax
from jax import P
from jax import numpy as jnp

from research.kernels.dispatch import place
from research.mesh import Partition
from research.models.transformer import TransformerConfig
from research.nn.precision import POLICIES
from research.nn.token_shift import shift

Init = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def window_sum(x: jax.Array, coefficients: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """sum_i coefficients[..., -1 - i] x_{t-i}, the sum taken in the dtype of the coefficients.

  x [batch, length, heads, head_dim]; coefficients [heads, 1 or head_dim, window], the last
  column for the current token. Rows before the start of a document are zero.
  """
  dtype = coefficients.dtype
  total, row = 0, x
  for i, column in enumerate(reversed(jnp.split(coefficients, coefficients.shape[-1], axis=-1))):
    row = row if i == 0 else shift(row, segment_ids)
    total = total + column[..., 0] * row.astype(dtype)
  return total.astype(x.dtype)


class Window(nnx.Module):
  """Each of the projections named in `of` becomes a learned causal sum over its last `window` rows.

  window: rows, the current one included. init: (key, [heads, 1 or head_dim, window]) ->
  parameters of that shape, or with fewer columns of which `limit` makes `window`.
  per_channel: a coefficient for every channel rather than every head. limit: applied to
  the parameters before use. residual: the raw row is added to the sum.
  """

  def __init__(
    self,
    key: jax.Array,
    cfg: TransformerConfig,
    partition: Partition,
    *,
    of: str,
    window: int,
    init: Init,
    per_channel: bool = False,
    limit: Callable[[jax.Array], jax.Array] | None = None,
    residual: bool = False,
  ):
    dtype = POLICIES[cfg.precision].params
    for name, its_key in zip(of, jax.random.split(key, len(of)), strict=True):
      shape = (cfg.heads if name == "q" else cfg.kv_heads, cfg.head_dim if per_channel else 1, window)
      spec = P(*partition.per_head, None)
      setattr(self, name, nnx.Param(jax.reshard(init(its_key, shape).astype(dtype), spec)))
    self.of, self.window, self.limit, self.residual = of, window, limit, residual

  @property
  def looks_back(self) -> dict[str, int]:
    """How many rows back of which projection; see `research.nn.attention.Attention`."""
    return dict.fromkeys(self.of, self.window - 1)

  def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None):
    """q, k, v [batch, length, heads, head_dim], those in `of` mixed."""
    rows = {"q": q, "k": k, "v": v}
    for name in self.of:
      coefficients = place(getattr(self, name)[...], P(None, None, None))  # a few numbers: every device has them all
      coefficients = coefficients if self.limit is None else self.limit(coefficients)
      mixed = window_sum(rows[name], coefficients, segment_ids)
      rows[name] = rows[name] + mixed if self.residual else mixed
    return rows["q"], rows["k"], rows["v"]


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """All but the earliest row ~ U(0, 1); the earliest what is left to 1, which may be negative (section 4.7)."""
  later = jax.random.uniform(key, (*shape[:-1], shape[-1] - 1))
  return jnp.concatenate([1 - later.sum(-1, keepdims=True), later], axis=-1)


def logit_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Before a sigmoid: the coefficient of the current token then ~ U(0, 1), as in KV shifting itself."""
  now = jax.random.uniform(key, (*shape[:-1], 1), minval=1e-3, maxval=1 - 1e-3)
  return jnp.log(now / (1 - now))


def constant(*columns: float) -> Init:
  """The same coefficients everywhere, the previous token's first."""
  return lambda key, shape: jnp.broadcast_to(jnp.array(columns), shape)


def convolution(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """U(-w^-1/2, w^-1/2) over a window of w: a depthwise convolution's customary start.

  Canon layers rely on it. A start at the identity costs a convolution most of its gain
  in a short run, as it does KV shifting (`identity`).
  """
  return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) * shape[-1] ** -0.5


def gate(a: jax.Array) -> jax.Array:
  """One free number a head: a1 = sigmoid(a), a2 = 1 - a1."""
  now = jax.nn.sigmoid(a)
  return jnp.concatenate([1 - now, now], axis=-1)


def clip(a: jax.Array) -> jax.Array:
  """Coefficients kept between 0 and 1."""
  return jnp.clip(a, 0, 1)


# What --config.attention can name beside plain attention and KV shifting itself.
VARIANTS = {
  name: functools.partial(Window, **settings)
  for name, settings in {
    # the paper's ablations
    "gate": {"of": "kv", "window": 2, "init": logit_uniform, "limit": gate},
    "clip": {"of": "kv", "window": 2, "init": uniform, "limit": clip},
    "konly": {"of": "k", "window": 2, "init": uniform},
    "vonly": {"of": "v", "window": 2, "init": uniform},
    "window3": {"of": "kv", "window": 3, "init": uniform},
    "window4": {"of": "kv", "window": 4, "init": uniform},
    "qkv": {"of": "qkv", "window": 2, "init": uniform},
    # other starts of KV shifting: all current, half and half, all previous
    "identity": {"of": "kv", "window": 2, "init": constant(0.0, 1.0)},
    "half": {"of": "kv", "window": 2, "init": constant(0.5, 0.5)},
    "previous": {"of": "kv", "window": 2, "init": constant(1.0, 0.0)},
    # peers: a short depthwise convolution of keys and values, and Canon-B (Allen-Zhu, arXiv 2512.17351)
    "conv": {"of": "kv", "window": 4, "init": convolution, "per_channel": True},
    "canon": {"of": "qkv", "window": 4, "init": convolution, "per_channel": True, "residual": True},
  }.items()
}
