"""Text from a trained model: prefill once, then one token a step from a cache, in one compiled program."""

from collections.abc import Callable, Sequence
import dataclasses
import functools

import jax
from jax import P
from jax import numpy as jnp
import numpy as np

from research.errors import check
from research.kernels.dispatch import batch_shards, place
from research.models.decoder import Decoder

_MULTIPLE = 64  # prompts are padded to multiples of it, so that other lengths do not compile anew


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn; the filters act in this order. Raises UserError.

  temperature: the logits are divided by it; 0 is greedy.
  top_k: of the most likely so many; 0: all.
  top_p: of the fewest, most likely first, that together have at least this probability
    (Holtzman et al., 2020, arXiv 1904.09751); 1: all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    check(self.temperature >= 0, "temperature", self.temperature, "use 0 (greedy) or a positive number")
    check(self.top_k >= 0, "top_k", self.top_k, "use 0 (all tokens) or a positive number")
    check(0 < self.top_p <= 1, "top_p", self.top_p, "must lie in (0, 1]")


def generate(
  model: Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  tokens: int,
  sampling: Sampling = Sampling(),
  stop: Sequence[int] = (),
  seed: int = 0,
) -> list[list[int]]:
  """What the model continues each of `prompts` (token ids, of any lengths) with.

  Each continuation has at most `tokens` ids; it ends with the first of the ids in `stop`.
  What a prompt gets depends on the seed and its place, not on the other prompts.
  Call it under the mesh that the model stands on. Raises UserError.
  """
  vocab = model.cfg.vocab
  check(tokens >= 1, "tokens", tokens, "use at least 1")
  check(len(prompts) > 0, "prompts", "none", "give at least one")
  for prompt in prompts:
    check(len(prompt) > 0, "prompt", "''", "needs at least one token")
    check(all(0 <= t < vocab for t in prompt), "prompt", list(prompt)[:8], f"token ids lie in 0 .. {vocab - 1}")
  check(all(0 <= t < vocab for t in stop), "stop", list(stop), f"token ids lie in 0 .. {vocab - 1}")
  shards = batch_shards()
  rows = -(-len(prompts) // shards) * shards
  length = -(-max(map(len, prompts)) // _MULTIPLE) * _MULTIPLE
  padded = np.zeros((rows, length), np.int32)
  lengths = np.ones(rows, np.int32)  # rows that fill up the mesh have a prompt of one token
  for i, prompt in enumerate(prompts):
    padded[i, length - len(prompt) :] = prompt
    lengths[i] = len(prompt)
  made = _generate(model, padded, lengths, jax.random.key(seed), tokens=tokens, sampling=sampling, stop=tuple(stop))
  out = []
  for row in jax.device_get(made)[: len(prompts)].tolist():
    ends = [i for i, t in enumerate(row) if t in stop]
    out.append(row[: ends[0] + 1] if ends else row)
  return out


@functools.partial(jax.jit, static_argnames=("tokens", "sampling", "stop"))
def _generate(model, prompts, lengths, key, *, tokens: int, sampling: Sampling, stop: tuple[int, ...]) -> jax.Array:
  draw = lambda logits, key: sample(logits[0], key, sampling)
  return continuations((model,), draw, prompts, lengths, key, tokens=tokens, stop=stop)


def continuations(
  models: tuple[Decoder, ...],
  draw: Callable[[list[jax.Array], jax.Array], jax.Array],
  prompts: jax.Array,
  lengths: jax.Array,
  key: jax.Array,
  *,
  tokens: int,
  stop: tuple[int, ...] = (),
) -> jax.Array:
  """int32 [batch, tokens] that follow `prompts` [batch, length], of which the last `lengths` are not padding.

  draw: (each model's float32 logits [batch, vocab] of the next token, key) -> int32 [batch]; all models read what
  was drawn. Traceable. What follows a row's first id of `stop` means nothing.
  """
  batch, length = prompts.shape
  at = jnp.arange(length) - (length - lengths[:, None])
  seen = ((at >= 0).astype(jnp.int32), jnp.maximum(at, 0))
  states = [model.prefill(prompts, *seen, length + tokens) for model in models]
  stops = jnp.array(stop, jnp.int32)

  def next_token(hidden, step):
    logits = [place(m.unembed(x[:, -1:])[:, 0], P(None, None)) for m, x in zip(models, hidden, strict=True)]
    return draw(logits, jax.random.fold_in(key, step))

  def body(carry):
    step, token, done, out, caches = carry
    row = (token[:, None], jnp.ones((batch, 1), jnp.int32), (lengths + step - 1)[:, None])
    states = [model.extend(*row, cache) for model, cache in zip(models, caches, strict=True)]
    token = next_token([x for x, _ in states], step)
    out = jax.lax.dynamic_update_slice(out, token[:, None], (jnp.zeros((), jnp.int32), step))
    return step + 1, token, done | jnp.isin(token, stops), out, [cache for _, cache in states]

  first = next_token([x for x, _ in states], 0)
  out = jnp.zeros((batch, tokens), jnp.int32).at[:, 0].set(first)
  start = (jnp.ones((), jnp.int32), first, jnp.isin(first, stops), out, [cache for _, cache in states])
  return jax.lax.while_loop(lambda c: (c[0] < tokens) & ~jnp.all(c[2]), body, start)[3]


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
  """int32 [batch] drawn from float32 `logits` [batch, vocab]; row i uses fold_in(key, i)."""
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = filtered(logits, sampling)
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(logits.shape[0]))
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
  """`logits` [batch, vocab] at the temperature, -inf where `top_k` or `top_p` rule a token out.

  Ties at the edge of `top_k` all stay; of ties at the edge of `top_p` the lower ids stay.
  """
  logits = logits / sampling.temperature
  vocab = logits.shape[-1]
  if 0 < sampling.top_k < vocab:
    least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if sampling.top_p < 1:
    order = jnp.argsort(-logits, axis=-1, stable=True)
    probs = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # of those more likely; the first has 0 and always stays
    rank = jnp.argsort(order, axis=-1)
    keep = jnp.take_along_axis(before < sampling.top_p, rank, axis=-1)
    logits = jnp.where(keep, logits, -jnp.inf)
  return logits
