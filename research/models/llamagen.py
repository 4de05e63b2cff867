"""LlamaGen: a Llama that writes an image token by token, row by row, after a token for its class.

Sun et al., 2024 (arXiv 2406.06525): the zoo's transformer with rotary positions of two
dimensions and dropout. The last class is the null class, for guidance.
"""

import dataclasses
import math

from flax import nnx
import jax
from jax import numpy as jnp

from research.errors import check
from research.kernels.cross_entropy.api import cross_entropy
from research.kernels.dispatch import place
from research.mesh import HIDDEN, PARTITIONS, TOKENS, MeshConfig
from research.metrics import Mean
from research.models import decoder
from research.models.transformer import Transformer, TransformerConfig
from research.nn.attention import Cache
from research.nn.dropout import drop_labels, dropout
from research.nn.init import fan_in
from research.nn.precision import POLICIES


@dataclasses.dataclass(frozen=True)
class LlamaGenConfig(TransformerConfig):
  """Those of the transformer, and: Raises UserError.

  classes: without the null class, which is number `classes`.
  tokens: of an image; a square number.
  token_dropout: of the input, residual_dropout: of what attention adds, mlp_dropout: of what the MLP
    adds, class_dropout: of labels; all only where a key is given.
  """

  vocab: int = 16384
  classes: int = 1000
  tokens: int = 256
  token_dropout: float = 0.1
  residual_dropout: float = 0.1
  mlp_dropout: float = 0.1
  class_dropout: float = 0.1

  def __post_init__(self):
    super().__post_init__()
    check(self.classes >= 1, "classes", self.classes, "must be at least 1")
    square = self.tokens >= 1 and self.rope_grid**2 == self.tokens
    check(square, "tokens", self.tokens, "must be a square number, e.g. 256 for 16 x 16")
    check(
      self.head_dim % 4 == 0, "head_dim", self.head_dim, "must be a multiple of 4: half turns by row, half by column"
    )
    for name in ("token_dropout", "residual_dropout", "mlp_dropout", "class_dropout"):
      check(0 <= getattr(self, name) < 1, name, getattr(self, name), "must lie in [0, 1)")

  @property
  def rope_grid(self) -> int:
    return math.isqrt(self.tokens)


# layers, heads, width; heads have width / heads numbers
SIZES = {
  "B": (12, 12, 768),
  "L": (24, 16, 1024),
  "XL": (36, 20, 1280),
  "XXL": (48, 24, 1536),
  "3B": (24, 32, 3200),
}


def official(size: str, **changes) -> LlamaGenConfig:
  """The config of a released model: B, L, XL, XXL or 3B; tokens=576 for those of 384 pixels. Raises UserError."""
  check(size in SIZES, "size", size, f"choose from {', '.join(SIZES)}")
  layers, heads, width = SIZES[size]
  sizes = {"layers": layers, "heads": heads, "kv_heads": heads, "width": width, "head_dim": width // heads}
  return LlamaGenConfig(**sizes | {"mlp_width": -(-int(8 * width / 3) // 256) * 256} | changes)


class LlamaGen(nnx.Module):
  """A table of classes before the transformer. Build it under `jax.set_mesh`.

  The head starts at zero: every token is as likely as any other.
  """

  def __init__(self, key: jax.Array, cfg: LlamaGenConfig, partition: str = MeshConfig.partition):
    specs, policy = PARTITIONS[partition](), POLICIES[cfg.precision]
    decoder_key, class_key = jax.random.split(key)
    self.decoder = Transformer(decoder_key, cfg, partition)
    self.decoder.head = nnx.Param(jnp.zeros_like(self.decoder.head[...]), table=True)
    # not cut by rows: their number, with the null class, seldom divides
    spec = jax.P(None, specs.embed[1])
    shape = (cfg.classes + 1, cfg.width)
    self.classes = nnx.Param(fan_in(class_key, shape, cfg.width, policy.params, spec), table=True)
    self.cfg = cfg

  def __call__(self, tokens: jax.Array, labels: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """tokens int32 [batch, length], labels int32 [batch] -> hidden states [batch, length, width] that predict them.

    Row t has seen the class and the tokens before t: the last token is not looked at. With a
    key dropouts act, and labels are dropped.
    """
    cfg = self.cfg
    label_key, input_key, layers_key = (None,) * 3 if key is None else jax.random.split(key, 3)
    labels = drop_labels(label_key, labels, cfg.class_dropout, cfg.classes)
    x = self._embed_class(labels)
    if tokens.shape[1] > 1:
      x = place(jnp.concatenate([x, self.decoder.lookup(place(tokens, TOKENS)[:, :-1])], axis=1), HIDDEN)
    x = dropout(input_key, x, cfg.token_dropout)
    rates = {"attention": cfg.residual_dropout, "mlp": cfg.mlp_dropout}

    def drop(layer, branch, y):
      branch_key = jax.random.fold_in(layers_key, 2 * layer + list(rates).index(branch))
      return dropout(branch_key, y, rates[branch])

    return self.decoder.run(x, *_rows(tokens.shape[0], 0, tokens.shape[1]), None if key is None else drop)

  def begin(self, labels: jax.Array) -> tuple[jax.Array, Cache]:
    """labels int32 [batch] -> the hidden state [batch, 1, width] that predicts the first token, and a cache."""
    x = self._embed_class(labels)
    return self.decoder.prefill_embedded(x, *_rows(len(labels), 0, 1), self.cfg.tokens)

  def extend(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Hidden states [batch, length, width] that predict what follows each of `tokens`, which follow `cache`."""
    batch, length = tokens.shape
    return self.decoder.extend(tokens, *_rows(batch, cache.length, length), cache)

  def _embed_class(self, labels: jax.Array) -> jax.Array:
    weight = POLICIES[self.cfg.precision].weight(self.classes[...])
    return weight.at[place(labels, jax.P(TOKENS[0]))[:, None]].get(out_sharding=HIDDEN)

  def head_weight(self) -> jax.Array:
    """The output projection [width, vocab] in the compute dtype, gathered along `data`."""
    return self.decoder.head_weight()

  def unembed(self, x: jax.Array) -> jax.Array:
    """Final hidden states [batch, length, width] -> float32 logits [batch, length, vocab]."""
    return self.decoder.unembed(x)

  def log_likelihood(self, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """Final hidden states of `tokens` [batch, length] -> log p of each row in nats, float32 [batch]."""
    return decoder.row_log_likelihood(x, self.head_weight(), tokens)

  def logits(self, tokens: jax.Array, labels: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """float32 [batch, length, vocab], of each token given the class and the tokens before it."""
    return self.unembed(self(tokens, labels, key))


def loss(model: LlamaGen, batch: dict[str, jax.Array], key: jax.Array | None) -> dict[str, Mean]:
  """Cross-entropy of the image tokens in nats, a mean over all: batch has tokens [batch, length] and labels [batch]."""
  x = model(batch["tokens"], batch["labels"], key)
  weights = jnp.ones_like(batch["tokens"], jnp.float32)
  total = cross_entropy(x, model.head_weight(), batch["tokens"], weights)
  return {"loss": Mean(total, jnp.sum(weights))}


def _rows(batch: int, start, length: int) -> tuple[jax.Array, jax.Array]:
  """Segment ids and positions, [batch, length], of tokens from `start` on."""
  positions = jnp.broadcast_to(start + jnp.arange(length, dtype=jnp.int32), (batch, length))
  return place(jnp.ones((batch, length), jnp.int32), TOKENS), place(positions, TOKENS)
