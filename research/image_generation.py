"""Images from trained models: class-conditional sampling with a cache, in one compiled program.

Guidance is in the convention of each model's released code. With s = 0 for none, as the papers on guidance have
it, LlamaGen's scale is 1 + s, at every token; VAR's is its s at the last scale, from 0 at the first.
"""

from collections.abc import Sequence
import functools

import jax
from jax import P
from jax import numpy as jnp
import numpy as np

from research.errors import check
from research.generation import Sampling, sample
from research.kernels.dispatch import batch_shards, place
from research.mesh import BATCH
from research.models.llamagen import LlamaGen
from research.models.var import VAR
from research.models.vqvae import VQVAE

_PLAIN = Sampling()


def llamagen_tokens(
  model: LlamaGen,
  labels: Sequence[int],
  *,
  guidance: float = 1.0,
  interval: int = -1,
  sampling: Sampling = _PLAIN,
  seed: int = 0,
) -> np.ndarray:
  """Codes int32 [len(labels), tokens] drawn for each class; the null class is label `classes`.

  guidance: logits are null + guidance (class - null); 1: no guidance, at half the cost.
  interval: guidance ends after token interval + 1 (the first is number 0); -1: never.
  What a row gets depends on the seed and its place, not on the other rows. Raises UserError.
  """
  check(guidance >= 1, "guidance", guidance, "use 1 (none) or more")
  check(interval >= -1, "interval", interval, "use -1 (all tokens) or more")
  rows = _rows(labels, model.cfg.classes)
  last = model.cfg.tokens if interval == -1 else interval + 1
  scale, last = jnp.asarray(guidance, jnp.float32), jnp.asarray(last, jnp.int32)
  made = _llamagen(model, rows, jax.random.key(seed), scale, last, guided=guidance > 1, sampling=sampling)
  return jax.device_get(made)[: len(labels)]


def var_tokens(
  model: VAR,
  tokenizer: VQVAE,
  labels: Sequence[int],
  *,
  guidance: float = 0.0,
  sampling: Sampling = _PLAIN,
  seed: int = 0,
) -> np.ndarray:
  """Codes int32 [len(labels), tokens] drawn for each class; what `tokenizer` makes of a scale is read at the next.

  guidance: at scale i of K logits are (1 + t) class - t null, t = guidance i / (K - 1); 0: no guidance,
  at half the cost. What a row gets depends on the seed and its place, not on the other rows. Raises UserError.
  """
  codes, _ = _draw_var(model, tokenizer, labels, guidance, sampling, seed)
  return jax.device_get(codes)[: len(labels)]


def var_images(
  model: VAR,
  tokenizer: VQVAE,
  labels: Sequence[int],
  *,
  guidance: float = 0.0,
  sampling: Sampling = _PLAIN,
  seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """As `var_tokens`, and the images that the codes stand for, float32 NHWC in [-1, 1]."""
  codes, features = _draw_var(model, tokenizer, labels, guidance, sampling, seed)
  codes, images = jax.device_get((codes, _decoded(tokenizer, features)))
  return codes[: len(labels)], images[: len(labels)]


def check_tokenizer(model: VAR, tokenizer: VQVAE) -> None:
  """Raises UserError unless the codes of `tokenizer` are those that `model` speaks of."""
  for name in ("vocab", "code_width", "scales"):
    ours, theirs = getattr(model.cfg, name), getattr(tokenizer.cfg, name)
    check(theirs == ours, f"tokenizer.{name}", theirs, f"must be the model's, {ours}")


@functools.partial(jax.jit, static_argnames=("guided", "sampling"))
def _llamagen(model, labels, key, scale, last, *, guided: bool, sampling: Sampling) -> jax.Array:
  """last: the last token that is guided."""
  batch = len(labels)

  def draw(x, step):
    logits = place(model.unembed(x)[:, -1], P(None, None))
    if guided:
      cond, null = logits[:batch], logits[batch:]
      logits = jnp.where(step <= last, null + scale * (cond - null), cond)
    return sample(logits, jax.random.fold_in(key, step), sampling)

  def body(carry, step):
    token, cache = carry
    x, cache = model.extend(_twice(token, guided)[:, None], cache)
    token = draw(x, step)
    return (token, cache), token

  x, cache = model.begin(_with_null(labels, model.cfg.classes, guided))
  first = draw(x, 0)
  _, rest = jax.lax.scan(body, (first, cache), jnp.arange(1, model.cfg.tokens))
  return jnp.concatenate([first[None], rest]).T


def _draw_var(model, tokenizer, labels, guidance, sampling, seed):
  check(guidance >= 0, "guidance", guidance, "use 0 (none) or more")
  check_tokenizer(model, tokenizer)
  rows, scale = _rows(labels, model.cfg.classes), jnp.asarray(guidance, jnp.float32)
  return _var(model, tokenizer, rows, jax.random.key(seed), scale, guided=guidance > 0, sampling=sampling)


@functools.partial(jax.jit, static_argnames=("guided", "sampling"))
def _var(model, tokenizer, labels, key, scale, *, guided: bool, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
  """Codes, and the features of the images that they stand for."""
  batch, scales, out = len(labels), model.cfg.scales, []
  labels = _with_null(labels, model.cfg.classes, guided)
  x, cache = model.begin(labels)
  features = 0.0
  for i, side in enumerate(scales):
    logits = place(model.unembed(x), P(None, None, None))
    if guided:
      t = scale * (i / (len(scales) - 1))
      logits = (1 + t) * logits[:batch] - t * logits[batch:]
    codes = sample(logits.reshape(-1, logits.shape[-1]), jax.random.fold_in(key, i), sampling)
    codes = codes.reshape(batch, side * side)
    out.append(codes)
    features = features + tokenizer.spread(codes, i)
    if i + 1 < len(scales):
      inputs = _twice(place(tokenizer.next_input(features, i), P(None, None, None)), guided)
      x, cache = model.extend(inputs, labels, cache)
  return jnp.concatenate(out, axis=1), features


@jax.jit
def _decoded(tokenizer, features):
  return jnp.clip(tokenizer.decode(features), -1, 1)


def check_labels(labels: np.ndarray, classes: int) -> None:
  """Raises UserError unless `labels` are a list of classes, of which the null class is number `classes`."""
  ok = labels.ndim == 1 and labels.size > 0 and np.issubdtype(labels.dtype, np.integer)
  check(ok, "labels", list(labels.shape), "give a list of whole numbers")
  bad = labels[(labels < 0) | (labels > classes)].tolist()
  check(not bad, "labels", bad[:4], f"classes lie in 0 .. {classes - 1}, and {classes} is the null class")


def _rows(labels: Sequence[int], classes: int) -> np.ndarray:
  """Checked labels, filled up to a multiple of the mesh's batch shards."""
  labels = np.asarray(labels)
  check_labels(labels, classes)
  shards = batch_shards()
  return np.concatenate([labels, np.zeros(-len(labels) % shards, labels.dtype)]).astype(np.int32)


def _with_null(labels, null, guided):
  labels = place(jnp.asarray(labels), P(None))
  return place(jnp.concatenate([labels, jnp.full_like(labels, null)]) if guided else labels, P(BATCH))


def _twice(x, guided):
  return jnp.concatenate([x, x]) if guided else x
