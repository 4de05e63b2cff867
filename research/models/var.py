"""VAR: an image scale by scale, all codes of a scale at once.

Tian et al., 2024 (arXiv 2404.02905). The tokens of a scale see all of their own and of the coarser
scales. They are read as what the tokenizer makes of the coarser scales (`VQVAE.inputs`), not as codes;
the first scale reads the class. The class also scales and shifts every layer (adaptive LayerNorm,
Peebles & Xie, 2023, arXiv 2212.09748). The last class is the null class, for guidance.
"""

import dataclasses
import math
from typing import ClassVar, Literal

from flax import nnx
import jax
from jax import P
from jax import numpy as jnp
import numpy as np

from research.errors import check
from research.kernels.attention.api import HEADS
from research.kernels.dispatch import place
from research.mesh import BATCH, HIDDEN, PARTITIONS, MeshConfig, Partition
from research.metrics import Mean
from research.models import decoder
from research.models.vqvae import check_scales
from research.nn.dropout import drop_labels, drop_path
from research.nn.init import fan_in
from research.nn.mlp import MLP
from research.nn.norms import standardize, unit
from research.nn.precision import POLICIES, Policy

KV = tuple[jax.Array, jax.Array]  # keys and values, [..., length, heads, head_dim] each


@dataclasses.dataclass(frozen=True)
class VARConfig:
  """Sizes and execution. Raises UserError on sizes that do not fit together.

  classes: without the null class, which is number `classes`. code_width: numbers a code of the tokenizer.
  scales: sides of the grids of tokens. qk_norm: queries and keys of length 1, with a learned
  temperature a head. shared_adaln: one matrix makes the scales and shifts of all layers.
  class_dropout, drop_path (of the last layer, less before it) act only where a key is given.
  gamma: how the weights of the layers' gates start, relative to the others.
  """

  vocab: int = 4096
  code_width: int = 32
  classes: int = 1000
  scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
  width: int = 1024
  layers: int = 16
  heads: int = 16
  mlp_width: int = 4096
  qk_norm: bool = True
  shared_adaln: bool = False
  norm_eps: float = 1e-6
  class_dropout: float = 0.1
  drop_path: float = 0.0
  gamma: float = 1e-3
  precision: Literal["float32", "bfloat16"] = "bfloat16"
  remat: Literal["none", "full", "dots"] = "none"
  layer_loop: Literal["auto", "scan", "unroll"] = "auto"  # auto: unroll on CPU, where it is faster, else scan
  attention_kernel: ClassVar[str] = "auto"  # dense: an image has some hundred tokens

  def __post_init__(self):
    for name in ("vocab", "code_width", "classes", "width", "layers", "heads", "mlp_width"):
      check(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
    check(self.width % self.heads == 0, "width", self.width, f"must be a multiple of heads={self.heads}")
    check_scales(self.scales)
    for name in ("class_dropout", "drop_path"):
      check(0 <= getattr(self, name) < 1, name, getattr(self, name), "must lie in [0, 1)")
    check(self.norm_eps > 0, "norm_eps", self.norm_eps, "must be positive, e.g. 1e-6")

  @property
  def head_dim(self) -> int:
    return self.width // self.heads

  @property
  def tokens(self) -> int:
    """Of an image."""
    return sum(n * n for n in self.scales)

  @property
  def levels(self) -> np.ndarray:
    """The number of each token's scale, int32 [tokens]."""
    return np.repeat(np.arange(len(self.scales), dtype=np.int32), np.square(self.scales))

  def check_mesh(self, mesh: dict[str, int], partition: str) -> None:
    """Raises UserError where the mesh does not fit the model, see `decoder.check_mesh`."""
    decoder.check_mesh(self, mesh, partition, ("vocab", "heads", "mlp_width", "width"))


LARGE = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)  # the scales of 512 pixels
# of the released models: depth, and how much smaller the gates start
SIZES = {"d16": (16, 1e-3), "d20": (20, 1e-3), "d24": (24, 1e-4), "d30": (30, 1e-5), "d36-s": (36, 1e-5)}


def official(size: str, **changes) -> VARConfig:
  """The config of a released model: d16, d20, d24, d30 (256 pixels) or d36-s (512). Raises UserError."""
  check(size in SIZES, "size", size, f"choose from {', '.join(SIZES)}")
  depth, gamma = SIZES[size]
  sizes = {"width": 64 * depth, "layers": depth, "heads": depth, "mlp_width": 256 * depth}
  sizes |= {"gamma": gamma, "drop_path": 0.1 * depth / 24}
  if size.endswith("-s"):
    sizes |= {"shared_adaln": True, "scales": LARGE}
  return VARConfig(**sizes | changes)


class Attention(nnx.Module):
  """Self-attention with a bias for queries and values, none for keys.

  With qk_norm, queries and keys have length 1 and head h the scale min(exp(scale_h), 100); else the scale is
  0.25 / sqrt(head_dim), as in the released code.
  """

  def __init__(self, key: jax.Array, cfg: VARConfig, specs: Partition, policy: Policy):
    qkv_key, out_key = jax.random.split(key)
    shape = (cfg.width, cfg.heads, 3, cfg.head_dim)
    self.qkv = nnx.Param(
      fan_in(qkv_key, shape, 3 * cfg.width, policy.params, specs.qkv), matrix=((-4,), (-1,))
    )  # for Muon every head is a matrix of its own
    shape = (cfg.heads, 1, cfg.head_dim, cfg.width)
    self.out = nnx.Param(
      fan_in(out_key, shape, 3 * cfg.width, policy.params, specs.out, (2 * cfg.layers) ** -0.5),
      matrix=((-4, -3, -2), (-1,)),
    )
    zeros = lambda *shape, spec: nnx.Param(jnp.zeros(shape, policy.params, out_sharding=spec))
    self.q_bias = zeros(cfg.heads, cfg.head_dim, spec=specs.per_head)
    self.v_bias = zeros(cfg.heads, cfg.head_dim, spec=specs.per_head)
    self.out_bias = zeros(cfg.width, spec=specs.vector)
    spec = P(specs.per_head[0])
    start = jnp.full(cfg.heads, math.log(4), policy.params, out_sharding=spec)
    self.scale = nnx.Param(start) if cfg.qk_norm else None
    self.policy = policy

  def __call__(self, x: jax.Array, visible: np.ndarray | None, past: KV | None = None) -> tuple[jax.Array, KV]:
    """x [batch, length, width] that follows `past` -> the same shape, and keys and values with those of `past`.

    visible: bool [length, past + length], or None where every token sees all.
    """
    policy = self.policy
    y = jnp.einsum("btd,dkgh->btkgh", x, policy.weight(self.qkv[...]))
    q, k, v = (place(jnp.squeeze(z, 3), HEADS) for z in jnp.split(y, 3, axis=3))
    q, v = q + policy.weight(self.q_bias[...]), v + policy.weight(self.v_bias[...])
    if self.scale is None:
      q = q * (0.25 * q.shape[-1] ** -0.5)
    else:
      scale = jnp.exp(jnp.minimum(self.scale[...].astype(policy.reduce), math.log(100)))
      q, k = (z.astype(policy.reduce) for z in (q, k))
      q, k = (unit(q) * scale[:, None]).astype(v.dtype), unit(k).astype(v.dtype)
    if past is not None:
      k, v = (place(jnp.concatenate(z, axis=1), HEADS) for z in zip(past, (k, v), strict=True))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=policy.reduce)
    scores = scores if visible is None else jnp.where(visible, scores, -jnp.inf)
    y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    y = jnp.einsum("bthd,hgdw->btw", y, policy.weight(self.out[...]), out_sharding=HIDDEN)
    return y + policy.weight(self.out_bias[...]), (k, v)


class Block(nnx.Module):
  """x + gamma1 attention(norm(x) (1 + scale1) + shift1), then the same with the MLP."""

  def __init__(self, key: jax.Array, cfg: VARConfig, specs: Partition):
    policy = POLICIES[cfg.precision]
    attention_key, mlp_key, ada_key = jax.random.split(key, 3)
    self.attention = Attention(attention_key, cfg, specs, policy)
    self.mlp = MLP(
      mlp_key,
      width=cfg.width,
      hidden=cfg.mlp_width,
      activation=jax.nn.gelu,
      fan=3 * cfg.width,
      out_scale=(2 * cfg.layers) ** -0.5,
      partition=specs,
      policy=policy,
    )
    if cfg.shared_adaln:
      self.ada = None
      offset = fan_in(ada_key, (6, cfg.width), cfg.width, policy.params, P(None, None))
      self.ada_offset = nnx.Param(offset * _gates(cfg, 1.0)[:, None])
    else:
      self.ada, self.ada_offset = Modulation(ada_key, cfg, _gates(cfg, 0.5), specs), None
    self.cfg = cfg

  def __call__(self, x, condition, visible, past: KV | None = None, drop=lambda y, branch: y) -> tuple[jax.Array, KV]:
    """condition: [batch, width] of the class; [batch, 6, width] with shared scales and shifts."""
    policy = POLICIES[self.cfg.precision]
    if self.ada is None:
      six = condition + policy.weight(self.ada_offset[...])
    else:
      six = self.ada(condition)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = jnp.split(six, 6, axis=1)
    norm = lambda x: standardize(x, self.cfg.norm_eps, policy)
    y, kv = self.attention(norm(x) * (1 + scale1) + shift1, visible, past)
    x = x + drop(y * gamma1, 0)
    return x + drop(self.mlp(norm(x) * (1 + scale2) + shift2) * gamma2, 1), kv


class Modulation(nnx.Module):
  """silu(class) times a matrix: [batch, width] -> `len(scales)` vectors [batch, n, width]."""

  def __init__(self, key: jax.Array, cfg: VARConfig, scales: np.ndarray, specs: Partition):
    policy = POLICIES[cfg.precision]
    shape = (cfg.width, len(scales), cfg.width)
    weight = fan_in(key, shape, 3 * cfg.width, policy.params, specs.up)
    self.weight = nnx.Param(weight * scales[:, None], matrix=((-3,), (-1,)))
    self.bias = nnx.Param(jnp.zeros(shape[1:], policy.params, out_sharding=P(None, None)))
    self.policy = policy

  def __call__(self, condition: jax.Array) -> jax.Array:
    y = jnp.einsum("bd,dnw->bnw", jax.nn.silu(condition), self.policy.weight(self.weight[...]))
    return place(y, HIDDEN) + self.policy.weight(self.bias[...])


class VAR(nnx.Module):
  """Embeddings, blocks, head. Build it under `jax.set_mesh`."""

  def __init__(self, key: jax.Array, cfg: VARConfig, partition: str = MeshConfig.partition):
    specs, policy = PARTITIONS[partition](), POLICIES[cfg.precision]
    keys = jax.random.split(key, 9)
    row = P(None, specs.embed[1])  # tables of few rows, which seldom divide
    first = cfg.scales[0] ** 2

    def table(key, rows):
      return nnx.Param(fan_in(key, (rows, cfg.width), 3 * cfg.width, policy.params, row), table=True)

    self.classes = table(keys[0], cfg.classes + 1)
    self.start, self.positions = table(keys[1], first), table(keys[2], cfg.tokens)
    self.levels = table(keys[3], len(cfg.scales))
    word = fan_in(keys[4], (cfg.code_width, cfg.width), 3 * cfg.width, policy.params, row)
    self.word = nnx.Param(word, matrix=((-2,), (-1,)))
    self.word_bias = nnx.Param(jnp.zeros(cfg.width, policy.params, out_sharding=specs.vector))
    self.shared = Modulation(keys[5], cfg, np.ones(6, np.float32), specs) if cfg.shared_adaln else None
    self.blocks = jax.vmap(lambda k: Block(k, cfg, specs))(jax.random.split(keys[6], cfg.layers))
    self.ada = Modulation(keys[7], cfg, np.full(2, 0.5, np.float32), specs)
    head = fan_in(keys[8], (cfg.width, cfg.vocab), 3 * cfg.width, policy.params, specs.head, 0.02)
    self.head = nnx.Param(head, table=True)
    self.head_bias = nnx.Param(jnp.zeros(cfg.vocab, policy.params, out_sharding=P(specs.head[1])))
    self.cfg = cfg

  def __call__(self, inputs: jax.Array, labels: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """inputs float32 [batch, tokens - scales[0]^2, code_width], labels int32 [batch] -> hidden [batch, tokens, width].

    inputs: see `VQVAE.inputs`. With a key labels and branches of layers are dropped.
    """
    cfg = self.cfg
    label_key, layers_key = (None, None) if key is None else jax.random.split(key)
    labels = drop_labels(label_key, labels, cfg.class_dropout, cfg.classes)
    classes, condition = self._condition(labels)
    x = jnp.concatenate([self._first(classes), self._later(inputs, cfg.scales[0] ** 2)], axis=1)
    x, visible = place(x, HIDDEN), cfg.levels[:, None] >= cfg.levels

    def layer(i, block, x):
      def drop(y, branch):
        rate = cfg.drop_path * i / max(cfg.layers - 1, 1)
        return (
          y if not cfg.drop_path or key is None else drop_path(jax.random.fold_in(layers_key, 2 * i + branch), y, rate)
        )

      return block(x, condition, visible, drop=drop)[0]

    f = decoder.REMAT[cfg.remat](layer)
    layers = (jnp.arange(cfg.layers), self.blocks)
    x, _ = decoder.over_layers(lambda x, layer: (f(*layer, x), None), x, layers, cfg.layer_loop)
    return self._finish(x, classes)

  def begin(self, labels: jax.Array) -> tuple[jax.Array, KV]:
    """labels int32 [batch] -> hidden states [batch, scales[0]^2, width] of the first scale, and a cache."""
    classes, condition = self._condition(labels)
    return self._extend(self._first(classes), classes, condition, None)

  def extend(self, inputs: jax.Array, labels: jax.Array, cache: KV) -> tuple[jax.Array, KV]:
    """Hidden states of the next scale, of which `inputs` [batch, side^2, code_width] are all, and the longer cache."""
    classes, condition = self._condition(labels)
    return self._extend(self._later(inputs, cache[0].shape[2]), classes, condition, cache)

  def _extend(self, x, classes, condition, cache):
    past = (self.blocks,) if cache is None else (self.blocks, cache)
    step = lambda x, layer: layer[0](x, condition, None, *layer[1:])
    x, cache = decoder.over_layers(step, x, past, self.cfg.layer_loop)
    return self._finish(x, classes), cache

  def _condition(self, labels):
    """The class's embedding [batch, width], and what the blocks make of it."""
    weight = POLICIES[self.cfg.precision].weight(self.classes[...])
    classes = weight.at[place(labels, P(BATCH))].get(out_sharding=P(BATCH, None))
    return classes, classes if self.shared is None else self.shared(classes)

  def _first(self, classes):
    weight = POLICIES[self.cfg.precision].weight
    x = classes[:, None] + weight(self.start[...])
    return self._place_tokens(x, 0)

  def _later(self, inputs, start):
    policy = POLICIES[self.cfg.precision]
    x = place(inputs.astype(policy.compute), HIDDEN)
    x = jnp.einsum("btc,cw->btw", x, policy.weight(self.word[...])) + policy.weight(self.word_bias[...])
    return self._place_tokens(x, start)

  def _place_tokens(self, x, start):
    weight, stop = POLICIES[self.cfg.precision].weight, start + x.shape[1]
    x = x + weight(self.positions[...])[start:stop] + weight(self.levels[...])[self.cfg.levels[start:stop]]
    return place(x, HIDDEN)

  def _finish(self, x, classes):
    scale, shift = jnp.split(self.ada(classes), 2, axis=1)
    return standardize(x, self.cfg.norm_eps, POLICIES[self.cfg.precision]) * (1 + scale) + shift

  def head_weight(self) -> jax.Array:
    """The output projection [width, vocab] in the compute dtype, gathered along `data`; to it comes `head_bias`."""
    return POLICIES[self.cfg.precision].weight(self.head[...])

  def unembed(self, x: jax.Array) -> jax.Array:
    """Final hidden states [batch, length, width] -> float32 logits [batch, length, vocab]."""
    return decoder.unembed(x, self.head_weight()) + self.head_bias[...].astype(jnp.float32)

  def log_likelihood(self, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """Final hidden states of `tokens` [batch, length] -> log p of each row in nats, float32 [batch]."""
    return decoder.row_log_likelihood(x, self.head_weight(), tokens, self.head_bias[...])

  def logits(self, inputs: jax.Array, labels: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """float32 [batch, tokens, vocab], of each token given the class and the coarser scales."""
    return self.unembed(self(inputs, labels, key))


def loss(model: VAR, batch: dict[str, jax.Array], key: jax.Array | None) -> dict[str, Mean]:
  """Cross-entropy of the image tokens in nats, a mean over all: batch has tokens, inputs and labels."""
  logits = model.logits(batch["inputs"], batch["labels"], key)
  total = -jnp.sum(decoder.log_likelihood(logits, place(batch["tokens"], P(BATCH, None))))
  return {"loss": Mean(total, jnp.asarray(batch["tokens"].size, jnp.float32))}


def flops_per_token(cfg: VARConfig) -> dict[str, float]:
  """Model FLOPs a token of one training step (forward x 3), by part, a mean over the tokens of an image.

  Counts the matrix products only, as is usual for MFU, attention to the tokens that are seen, and what the class
  is multiplied by once an image. No recomputation is counted.
  """
  seen = sum(n * n * sum(m * m for m in cfg.scales[: i + 1]) for i, n in enumerate(cfg.scales)) / cfg.tokens
  modulations = (1 if cfg.shared_adaln else cfg.layers) * 6 + 2
  forward = {
    "attention projections": 2 * cfg.layers * 4 * cfg.width**2,
    "attention scores": 2 * cfg.layers * 2 * cfg.width * seen,
    "mlp": 2 * cfg.layers * 2 * cfg.width * cfg.mlp_width,
    "modulation": 2 * modulations * cfg.width**2 / cfg.tokens,
    "head": 2 * cfg.width * (cfg.vocab + cfg.code_width),
  }
  return {name: 3.0 * flops for name, flops in forward.items()}


def _gates(cfg: VARConfig, rest: float) -> np.ndarray:
  """How the six vectors of a block start: its two gates small, the others by `rest`."""
  return np.array([cfg.gamma] * 2 + [rest] * 4, np.float32)
