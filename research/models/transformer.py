"""The decoder-only transformer of the zoo, in the Llama family.

Pre-norm blocks of grouped-query attention and SwiGLU with RMSNorm and rotary
positions (Touvron et al., 2023, arXiv 2302.13971). Layers are stacked along a
leading axis of every parameter, whether they are then scanned or unrolled.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import ClassVar, Literal

from flax import nnx
import jax
from jax import numpy as jnp

from research.errors import check
from research.kernels.dispatch import place
from research.mesh import PARTITIONS, TOKENS, MeshConfig, Partition
from research.models import decoder
from research.nn.attention import Attention, Cache, empty_cache
from research.nn.mlp import GLU
from research.nn.norms import RMSNorm
from research.nn.precision import POLICIES
from research.nn.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Sizes and execution of the decoder. Raises UserError on sizes that do not fit together."""

  vocab: int = 256
  width: int = 128
  layers: int = 2
  heads: int = 4
  kv_heads: int = 4
  head_dim: int = 32
  mlp_width: int = 384
  rope_base: float = 10000.0
  rope_scaling: RopeScaling = RopeScaling()
  rope_grid: ClassVar[int] = 0  # of models of images, see `research.nn.attention`
  norm_eps: float = 1e-5
  qk_norm: bool = False
  tie_embeddings: bool = False
  precision: Literal["float32", "bfloat16"] = "bfloat16"
  remat: Literal["none", "full", "dots"] = "none"
  layer_loop: Literal["auto", "scan", "unroll"] = "auto"  # auto: unroll on CPU, where it is faster, else scan
  attention_kernel: Literal["auto", "reference", "xla", "splash", "cudnn"] = "auto"

  def __post_init__(self):
    for name in ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_width"):
      check(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
    check(self.heads % self.kv_heads == 0, "heads", self.heads, f"must be a multiple of kv_heads={self.kv_heads}")
    check(self.head_dim % 2 == 0, "head_dim", self.head_dim, "must be even: rotary positions turn pairs")
    check(self.rope_base > 1, "rope_base", self.rope_base, "must be larger than 1, e.g. 10000")
    check(self.norm_eps > 0, "norm_eps", self.norm_eps, "must be positive, e.g. 1e-5")

  def check_mesh(self, mesh: dict[str, int], partition: str) -> None:
    """Raises UserError where the mesh does not fit the model, see `decoder.check_mesh`."""
    decoder.check_mesh(self, mesh, partition, ("vocab", "kv_heads", "mlp_width"))


class Block(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, key: jax.Array, cfg: TransformerConfig, partition: Partition, mix: Callable | None):
    policy = POLICIES[cfg.precision]
    # Residual branches start smaller with depth (Radford et al., 2019).
    out_scale = (2 * cfg.layers) ** -0.5
    attention_key, mlp_key = jax.random.split(key)
    self.attention_norm = RMSNorm(cfg.width, cfg.norm_eps, policy)
    self.attention = Attention(
      attention_key,
      width=cfg.width,
      heads=cfg.heads,
      kv_heads=cfg.kv_heads,
      head_dim=cfg.head_dim,
      rope_base=cfg.rope_base,
      rope_scaling=cfg.rope_scaling,
      rope_grid=cfg.rope_grid,
      out_scale=out_scale,
      qk_norm_eps=cfg.norm_eps if cfg.qk_norm else None,
      partition=partition,
      policy=policy,
      # a key of its own: the shared weights start the same with and without it
      mix=None if mix is None else mix(jax.random.fold_in(key, 0), cfg, partition),
      implementation=None if cfg.attention_kernel == "auto" else cfg.attention_kernel,
    )
    self.mlp_norm = RMSNorm(cfg.width, cfg.norm_eps, policy)
    self.mlp = GLU(
      mlp_key,
      width=cfg.width,
      hidden=cfg.mlp_width,
      activation=jax.nn.silu,
      out_scale=out_scale,
      partition=partition,
      policy=policy,
    )

  def __call__(
    self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array, drop: Callable | None = None
  ) -> jax.Array:
    """drop(branch, y): what stays of the output of "attention" or "mlp" before it is added."""
    drop = drop or (lambda branch, y: y)
    x = x + drop("attention", self.attention(self.attention_norm(x), segment_ids, positions))
    return x + drop("mlp", self.mlp(self.mlp_norm(x)))

  def extend(self, x, segment_ids, positions, cache: Cache, layer, fresh: bool) -> tuple[jax.Array, Cache]:
    """As a call, for tokens that follow those in `cache`."""
    y, cache = self.attention.extend(self.attention_norm(x), segment_ids, positions, cache, layer, fresh)
    x = x + y
    return x + self.mlp(self.mlp_norm(x)), cache


class Transformer(nnx.Module):
  """Embedding, `layers` blocks, final norm, head. Build it under `jax.set_mesh`.

  `mix(key, cfg, partition)`, if given, builds the module each layer applies to its
  raw (q, k, v); see `research.nn.attention`.
  """

  def __init__(
    self,
    key: jax.Array,
    cfg: TransformerConfig,
    partition: str = MeshConfig.partition,
    mix: Callable | None = None,
  ):
    specs, policy = PARTITIONS[partition](), POLICIES[cfg.precision]
    embed_key, head_key, blocks_key = jax.random.split(key, 3)
    self.embed, self.head = decoder.tables(embed_key, head_key, cfg, specs)
    self.blocks = jax.vmap(lambda k: Block(k, cfg, specs, mix))(jax.random.split(blocks_key, cfg.layers))
    self.norm = RMSNorm(cfg.width, cfg.norm_eps, policy)
    self.cfg = cfg

  def __call__(self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """tokens, segment_ids, positions int32 [batch, length] -> final hidden states [batch, length, width]."""
    return self.run(self.lookup(tokens), segment_ids, positions)

  def run(self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array, drop: Callable | None = None) -> jax.Array:
    """Embedded tokens [batch, length, width] -> final hidden states.

    drop(layer, branch, y), if given, is what stays of the output of a layer's "attention" or "mlp".
    """

    def layer(i, block, x):
      return block(x, segment_ids, positions, drop and functools.partial(drop, i))

    f = decoder.REMAT[self.cfg.remat](layer)
    layers = (jnp.arange(self.cfg.layers), self.blocks)
    x, _ = decoder.over_layers(lambda x, layer: (f(*layer, x), None), x, layers, self.cfg.layer_loop)
    return self.norm(x)

  def attention_weights(self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """What every head attends to, float32 [layers, batch, heads, length, length]: dense, for looking inside."""
    x, out = self.lookup(tokens), []
    for block in decoder.unstack(self.blocks):
      out.append(block.attention.weights(block.attention_norm(x), segment_ids, positions))
      x = block(x, segment_ids, positions)
    return jnp.stack(out)

  def prefill(
    self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, capacity: int
  ) -> tuple[jax.Array, Cache]:
    """As a call; also returns a cache with room for `capacity` tokens a row, for `extend`.

    Rows of different lengths are padded on their left, with segment 0.
    """
    return self.prefill_embedded(self.lookup(place(tokens, TOKENS)), segment_ids, positions, capacity)

  def prefill_embedded(
    self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array, capacity: int
  ) -> tuple[jax.Array, Cache]:
    """As `prefill`, of embedded tokens [batch, length, width]."""
    cfg, (batch, length, _) = self.cfg, x.shape
    check(length <= capacity, "capacity", capacity, f"must be at least the length {length}")
    sizes = (cfg.layers, batch, capacity, cfg.heads, cfg.kv_heads, cfg.head_dim)
    cache = empty_cache(self.blocks.attention.mix, *sizes, POLICIES[cfg.precision].compute)
    return self._extend(x, segment_ids, positions, cache, fresh=True)

  def extend(
    self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    """Hidden states [batch, length, width] of tokens that follow those in `cache`, and the longer cache.

    The caller sees to it that the cache has room: `cache.length + length <= capacity`.
    """
    return self._extend(self.lookup(place(tokens, TOKENS)), segment_ids, positions, cache, fresh=False)

  def _extend(self, x, segment_ids, positions, cache: Cache, fresh: bool) -> tuple[jax.Array, Cache]:
    segment_ids, positions = place(segment_ids, TOKENS), place(positions, TOKENS)
    cache = cache.begin(segment_ids)

    def body(carry, xs):
      layer, block = xs
      return block.extend(carry[0], segment_ids, positions, carry[1], layer, fresh), None

    layers = jnp.arange(self.cfg.layers)
    (x, cache), _ = decoder.over_layers(body, (x, cache), (layers, self.blocks), self.cfg.layer_loop)
    return self.norm(x), cache.end(segment_ids)

  def lookup(self, tokens: jax.Array) -> jax.Array:
    """tokens int32 [batch, length] -> their embeddings [batch, length, width] in the compute dtype."""
    return decoder.lookup(self.embed, tokens, POLICIES[self.cfg.precision])

  def head_weight(self) -> jax.Array:
    """The output projection [width, vocab] in the compute dtype, gathered along `data`."""
    return decoder.head_weight(self.embed, self.head, POLICIES[self.cfg.precision])

  def logits(self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """float32 logits [batch, length, vocab]. Holds them all: for evaluation and small batches."""
    return self.unembed(self(tokens, segment_ids, positions))

  def unembed(self, x: jax.Array) -> jax.Array:
    """Final hidden states [batch, length, width] -> float32 logits [batch, length, vocab]."""
    return decoder.unembed(x, self.head_weight())


def flops_per_token(cfg: TransformerConfig, length: int) -> dict[str, float]:
  """Model FLOPs a token of one training step (forward x 3), by part, at rows of `length` tokens.

  Counts the matrix products only, as is usual for MFU, and attention at its causal
  cost: a token sees (length + 1) / 2 others on average. No recomputation is counted.
  """
  heads_width = cfg.heads * cfg.head_dim
  forward = {
    "attention projections": 2 * cfg.layers * cfg.width * (2 * heads_width + 2 * cfg.kv_heads * cfg.head_dim),
    "attention scores": 2 * cfg.layers * 2 * heads_width * (length + 1) / 2,
    "mlp": 2 * cfg.layers * 3 * cfg.width * cfg.mlp_width,
    "head": 2 * cfg.width * cfg.vocab,
  }
  return {name: 3.0 * flops for name, flops in forward.items()}
