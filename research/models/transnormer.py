"""TransNormerLLM: a decoder of gated linear attention with exponential decay.

Qin et al., 2023 (arXiv 2307.14995), with Lightning Attention-2 (2401.04658). A state of one size
for every text takes the place of the keys and values of the past, so a step of decoding costs
the same after any number of tokens.

Two things that go by one name: the paper's equation 10 and the released code (and with it every
released checkpoint) have different rates of decay; see `research.nn.linear_attention.decay_rates`.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Literal

from flax import nnx
import jax
from jax import P
from jax import numpy as jnp
import numpy as np

from research.errors import check
from research.kernels.dispatch import on_mesh, place
from research.kernels.lightning_attention.api import IMPLEMENTATIONS, STATE
from research.kernels.lightning_attention.features import ACTIVATIONS
from research.mesh import BATCH, PARTITIONS, TOKENS, MeshConfig, Partition
from research.models import decoder
from research.nn.linear_attention import GatedLinearAttention, decay_rates
from research.nn.mlp import GLU
from research.nn.norms import NORMS
from research.nn.precision import POLICIES


@dataclasses.dataclass(frozen=True)
class TransNormerConfig:
  """Sizes and execution of the decoder. Raises UserError on sizes that do not fit together.

  position: who has phases beside the decay (LRPE-d, equation 9): the first layer, all, or none; or the
    sinusoids of Vaswani et al. (2017, arXiv 1706.03762) added to the embeddings ("ape").
  decay, temperature: see `research.nn.linear_attention.decay_rates`.
  gate: whether attention is multiplied by u. activation: of queries and keys. glu_activation: of the GLU.
  scale_embedding: embeddings are multiplied by sqrt(width), as in the first released checkpoints.
  """

  vocab: int = 256
  width: int = 128
  layers: int = 2
  heads: int = 4
  head_dim: int = 32
  glu_width: int = 384
  position: Literal["lrpe_first", "lrpe_all", "none", "ape"] = "lrpe_first"
  decay: Literal["paper", "released", "none"] = "released"
  temperature: bool = True
  gate: bool = True
  activation: Literal[*ACTIVATIONS] = "silu"
  glu_activation: Literal[*ACTIVATIONS] = "none"
  norm: Literal[*NORMS] = "srms"
  norm_eps: float = 1e-6
  scale_embedding: bool = True
  tie_embeddings: bool = True
  precision: Literal["float32", "bfloat16"] = "bfloat16"
  remat: Literal["none", "full", "dots"] = "none"
  layer_loop: Literal["auto", "scan", "unroll"] = "auto"  # auto: unroll on CPU, where it is faster, else scan
  attention_kernel: Literal["auto", *IMPLEMENTATIONS] = "auto"

  def __post_init__(self):
    for name in ("vocab", "width", "layers", "heads", "head_dim", "glu_width"):
      check(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
    even = self.position != "ape" or self.width % 2 == 0
    check(even, "width", self.width, "must be even for position=ape: sines and cosines come in pairs")
    check(self.norm_eps > 0, "norm_eps", self.norm_eps, "must be positive, e.g. 1e-6")

  @property
  def lrpe_layers(self) -> int:
    """How many layers, from the first on, have phases."""
    return {"lrpe_first": 1, "lrpe_all": self.layers}.get(self.position, 0)

  def check_mesh(self, mesh: dict[str, int], partition: str) -> None:
    """Raises UserError where the mesh does not fit the model, see `decoder.check_mesh`."""
    decoder.check_mesh(self, mesh, partition, ("vocab", "heads", "glu_width"))


class Block(nnx.Module):
  """x + attention(norm(x)), then x + glu(norm(x)). All weights start at their fan-in, with no scale by depth."""

  def __init__(
    self,
    key: jax.Array,
    cfg: TransNormerConfig,
    lrpe: bool,
    partition: Partition,
    attention: Callable | None,
  ):
    policy = POLICIES[cfg.precision]
    attention_key, mlp_key = jax.random.split(key)
    self.attention_norm = NORMS[cfg.norm](cfg.width, cfg.norm_eps, policy)
    self.attention = GatedLinearAttention(
      attention_key,
      width=cfg.width,
      heads=cfg.heads,
      head_dim=cfg.head_dim,
      lrpe=lrpe,
      gate=cfg.gate,
      activation=cfg.activation,
      norm=cfg.norm,
      norm_eps=cfg.norm_eps,
      partition=partition,
      policy=policy,
      implementation=attention or (None if cfg.attention_kernel == "auto" else cfg.attention_kernel),
    )
    self.mlp_norm = NORMS[cfg.norm](cfg.width, cfg.norm_eps, policy)
    self.mlp = GLU(
      mlp_key,
      width=cfg.width,
      hidden=cfg.glu_width,
      activation=ACTIVATIONS[cfg.glu_activation],
      out_scale=1.0,
      partition=partition,
      policy=policy,
    )

  def __call__(self, x, segment_ids, positions, decay, state=None):
    """x [batch, length, width] after `state` -> the same after this layer, and the state after it."""
    y, state = self.attention(self.attention_norm(x), segment_ids, positions, decay, state)
    x = x + y
    return x + self.mlp(self.mlp_norm(x)), state


@functools.partial(jax.tree_util.register_dataclass, data_fields=["states", "segment"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class State:
  """What the decoder keeps of the tokens so far: of one size, however many they are.

  states: of each stack of layers, float32 [layers, batch, heads, d_k, d_v] and what it rounds off, of that shape too.
  segment: int32 [batch], of the last token; -1 before the first.
  """

  states: list[tuple[jax.Array, jax.Array]]
  segment: jax.Array


class TransNormer(nnx.Module):
  """Embedding, blocks, final norm, head. Build it under `jax.set_mesh`.

  The layers with phases are a stack of their own, before that of the others: their
  states are twice as tall. A stack without layers is None.

  `attention`, if given, computes attention in the place of `cfg.attention_kernel`: a function
  as `research.kernels.lightning_attention.api` takes it.
  """

  def __init__(
    self,
    key: jax.Array,
    cfg: TransNormerConfig,
    partition: str = MeshConfig.partition,
    attention: Callable | None = None,
  ):
    specs, policy = PARTITIONS[partition](), POLICIES[cfg.precision]
    embed_key, head_key, blocks_key = jax.random.split(key, 3)
    self.embed, self.head = decoder.tables(embed_key, head_key, cfg, specs)
    keys = jax.random.split(blocks_key, cfg.layers)

    def stack(keys, lrpe):
      return jax.vmap(lambda k: Block(k, cfg, lrpe, specs, attention))(keys) if len(keys) else None

    self.lrpe_blocks = stack(keys[: cfg.lrpe_layers], True)
    self.blocks = stack(keys[cfg.lrpe_layers :], False)
    self.norm = NORMS[cfg.norm](cfg.width, cfg.norm_eps, policy)
    self.cfg = cfg

  def __call__(self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """tokens, segment_ids, positions int32 [batch, length] -> final hidden states [batch, length, width]."""
    f = decoder.REMAT[self.cfg.remat](lambda block, decay, x: block(x, segment_ids, positions, decay)[0])
    x = self._embed(tokens, positions)
    for stack in self._stacks():
      x, _ = decoder.over_layers(lambda x, layer: (f(*layer, x), None), x, stack, self.cfg.layer_loop)
    return self.norm(x)

  def prefill(
    self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, capacity: int
  ) -> tuple[jax.Array, State]:
    """As a call; also returns the state, for `extend`, which has room for any number of tokens.

    Rows of different lengths are padded on their left, with segment 0.
    """
    del capacity  # other decoders need to know it
    cfg, batch = self.cfg, tokens.shape[0]

    def empty(blocks, decays):
      d_k = cfg.head_dim if blocks.attention.theta is None else 2 * cfg.head_dim
      shape = (len(decays), batch, cfg.heads, d_k, cfg.head_dim)
      zeros = jnp.zeros(shape, jnp.float32, out_sharding=P(None, *STATE) if on_mesh() else None)
      return zeros, zeros

    states = [empty(*stack) for stack in self._stacks()]
    segment = place(jnp.full(batch, -1, jnp.int32), P(BATCH))
    return self.extend(tokens, segment_ids, positions, State(states, segment))

  def extend(
    self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, cache: State
  ) -> tuple[jax.Array, State]:
    """Hidden states [batch, length, width] of tokens that follow those in `cache`, and the state after them."""
    tokens, segment_ids, positions = (place(x, TOKENS) for x in (tokens, segment_ids, positions))
    goes_on = (segment_ids[:, 0] == cache.segment)[:, None, None, None]

    def body(x, layer):
      block, decay, state = layer
      # where, not a product: a product would carry NaN and Inf from one document into the next
      return block(x, segment_ids, positions, decay, jax.tree.map(lambda s: jnp.where(goes_on, s, 0), state))

    x, states = self._embed(tokens, positions), []
    for stack, state in zip(self._stacks(), cache.states, strict=True):
      x, state = decoder.over_layers(body, x, (*stack, state), self.cfg.layer_loop)
      states.append(state)
    # of one row, jax 0.12 forgets where a slice stands
    return self.norm(x), State(states, place(segment_ids[:, -1], P(BATCH)))

  def _stacks(self) -> list[tuple[Block, np.ndarray]]:
    """The stacks of blocks that there are, and their layers' decays [layers, heads]."""
    cfg = self.cfg
    decays = np.exp(-decay_rates(cfg.decay, cfg.heads, cfg.layers, cfg.temperature)).astype(np.float32)
    stacks = [(self.lrpe_blocks, decays[: cfg.lrpe_layers]), (self.blocks, decays[cfg.lrpe_layers :])]
    return [(blocks, decay) for blocks, decay in stacks if blocks is not None]

  def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    x = decoder.lookup(self.embed, tokens, POLICIES[self.cfg.precision])
    if self.cfg.scale_embedding:
      x = x * self.cfg.width**0.5
    if self.cfg.position == "ape":
      x = x + sinusoids(place(positions, TOKENS), self.cfg.width).astype(x.dtype)
    return x

  def head_weight(self) -> jax.Array:
    """The output projection [width, vocab] in the compute dtype, gathered along `data`."""
    return decoder.head_weight(self.embed, self.head, POLICIES[self.cfg.precision])

  def logits(self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """float32 logits [batch, length, vocab]. Holds them all: for evaluation and small batches."""
    return self.unembed(self(tokens, segment_ids, positions))

  def unembed(self, x: jax.Array) -> jax.Array:
    """Final hidden states [batch, length, width] -> float32 logits [batch, length, vocab]."""
    return decoder.unembed(x, self.head_weight())


def sinusoids(positions: jax.Array, width: int) -> jax.Array:
  """positions int32 [batch, length] -> float32 [batch, length, width]: sin, then cos, of t / 10000^(2 i / width)."""
  angle = positions[:, :, None] * 10000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def flops_per_token(cfg: TransNormerConfig) -> dict[str, float]:
  """Model FLOPs a token of one training step (forward x 3), by part: the same at every length.

  Counts the matrix products only, as is usual for MFU, and attention at the cost of its recurrence
  (k v^T added to the state, then q times the state); chunks spend more. No recomputation is counted.
  """
  inner = cfg.heads * cfg.head_dim
  tall = cfg.layers + cfg.lrpe_layers  # phases double d_k
  forward = {
    "attention projections": 2 * cfg.layers * cfg.width * (5 if cfg.gate else 4) * inner,
    "attention state": 2 * 2 * tall * inner * cfg.head_dim,
    "mlp": 2 * cfg.layers * 3 * cfg.width * cfg.glu_width,
    "head": 2 * cfg.width * cfg.vocab,
  }
  return {name: 3.0 * flops for name, flops in forward.items()}
