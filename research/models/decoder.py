"""What the decoders of the zoo share: token tables, the loop over layers, the loss."""

from collections.abc import Callable
from typing import Any, Protocol

from flax import nnx
import jax
from jax import numpy as jnp

from research.errors import check
from research.kernels.cross_entropy.api import cross_entropy, row_cross_entropy
from research.kernels.dispatch import platform
from research.mesh import HIDDEN, Partition
from research.metrics import Mean
from research.nn.init import fan_in
from research.nn.precision import POLICIES, Policy

REMAT = {
  "none": lambda f: f,
  "full": jax.checkpoint,  # keep a layer's input only
  "dots": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}


# Where a kernel that is asked for by name runs; the others run anywhere.
KERNEL_PLATFORMS = {"splash": "tpu", "cudnn": "gpu", "pallas_tpu": "tpu", "pallas_gpu": "gpu"}


def check_mesh(cfg: Any, mesh: dict[str, int], partition: str, cut: tuple[str, ...]) -> None:
  """Raises UserError where a size does not divide by its mesh axis, or the kernel is another platform's.

  cut: the fields of `cfg` that the mesh axis `model` cuts.
  """
  needs = KERNEL_PLATFORMS.get(cfg.attention_kernel, platform())
  fix = f"needs a {needs}, and this runs on {platform()}; use auto"
  check(needs == platform(), "model.attention_kernel", cfg.attention_kernel, fix)
  if partition == "fsdp_tp":
    for name in cut:
      size = getattr(cfg, name)
      check(size % mesh["model"] == 0, f"model.{name}", size, f"must divide by mesh.model={mesh['model']}")
  if partition != "replicated":
    check(cfg.width % mesh["data"] == 0, "model.width", cfg.width, f"must divide by mesh.data={mesh['data']}")


class Decoder(Protocol):
  """What training, evaluation and generation ask of a model.

  tokens, segment_ids and positions are int32 [batch, length]; hidden states [batch, length, width].
  """

  cfg: Any  # with `vocab`

  def __call__(self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """-> final hidden states."""

  def prefill(
    self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, capacity: int
  ) -> tuple[jax.Array, Any]:
    """As a call; also returns a cache with room for `capacity` tokens a row, these included."""

  def extend(
    self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, cache: Any
  ) -> tuple[jax.Array, Any]:
    """Final hidden states of tokens that follow those in `cache`, and the cache after them."""

  def head_weight(self) -> jax.Array:
    """The output projection [width, vocab]."""

  def unembed(self, x: jax.Array) -> jax.Array:
    """Final hidden states -> float32 logits [batch, length, vocab]."""

  def logits(self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """-> float32 logits [batch, length, vocab]."""


def tables(embed_key: jax.Array, head_key: jax.Array, cfg: Any, specs: Partition) -> tuple[nnx.Param, nnx.Param | None]:
  """The embedding [vocab, width], and the head [width, vocab] unless the two are tied."""
  dtype = POLICIES[cfg.precision].params
  embed = nnx.Param(fan_in(embed_key, (cfg.vocab, cfg.width), cfg.width, dtype, specs.embed), table=True)
  if cfg.tie_embeddings:
    return embed, None
  return embed, nnx.Param(fan_in(head_key, (cfg.width, cfg.vocab), cfg.width, dtype, specs.head), table=True)


def lookup(embed: nnx.Param, tokens: jax.Array, policy: Policy) -> jax.Array:
  """The rows of the table: tokens int32 [batch, length] -> [batch, length, width] in the compute dtype."""
  return policy.weight(embed[...]).at[tokens].get(out_sharding=HIDDEN)


def head_weight(embed: nnx.Param, head: nnx.Param | None, policy: Policy) -> jax.Array:
  """The output projection [width, vocab] in the compute dtype, gathered along `data`."""
  return policy.weight(embed[...]).T if head is None else policy.weight(head[...])


def unembed(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Final hidden states [batch, length, width], head [width, vocab] -> float32 logits [batch, length, vocab]."""
  return jnp.einsum("btd,dv->btv", x, weight, preferred_element_type=jnp.float32)


def log_likelihood(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """log p of `tokens` int32 [batch, length] under float32 `logits` [batch, length, vocab], [batch, length]."""
  picked = tokens[..., None] == jnp.arange(logits.shape[-1])  # not a gather: the vocabulary may be cut
  return jnp.sum(jnp.where(picked, logits, 0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def row_log_likelihood(x: jax.Array, weight: jax.Array, tokens: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """log p of each row of `tokens` int32 [batch, length], float32 [batch]: a sum over its tokens, in nats.

  x [batch, length, width]: final hidden states; logits are x @ weight [width, vocab] + bias [vocab]. Those of a few
  tokens are there at a time, also for the gradients.
  """
  return -row_cross_entropy(x, weight, tokens, jnp.ones_like(tokens, jnp.float32), bias)


def over_layers(f: Callable, x: Any, xs: Any, layer_loop: str) -> tuple[Any, Any]:
  """As `jax.lax.scan(f, x, xs)`; unrolled where `layer_loop` ("auto", "scan" or "unroll") says so, or for one layer."""
  layers = jax.tree.leaves(xs)[0].shape[0]
  scans = platform() != "cpu" if layer_loop == "auto" else layer_loop == "scan"
  if scans and layers > 1:
    return jax.lax.scan(f, x, xs)
  ys = []
  for layer in unstack(xs):
    x, y = f(x, layer)
    ys.append(y)
  return x, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def unstack(xs: Any) -> list[Any]:
  """A tree of arrays stacked along their leading axis -> the trees of the layers."""
  # split, not indexing: its transpose is one concatenation instead of padded sums
  split = lambda p: [jnp.squeeze(s, 0) for s in jax.lax.split(p, [1] * p.shape[0])]
  leaves, structure = jax.tree.flatten(xs)
  return [jax.tree.unflatten(structure, layer) for layer in zip(*map(split, leaves), strict=True)]


def next_token_loss(model: Decoder, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, Mean]:
  """Cross-entropy in nats of `targets` under a decoder, weighted by `weights`.

  batch: tokens, targets, segment_ids, positions int32 and weights float32, all [batch, length].
  """
  del key  # deterministic
  x = model(batch["tokens"], batch["segment_ids"], batch["positions"])
  total = cross_entropy(x, model.head_weight(), batch["targets"], batch["weights"])
  return {"loss": Mean(total, jnp.sum(batch["weights"]))}
