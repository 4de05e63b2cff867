"""How likely a model finds images of each class, exactly: what only models that write images token by token can say."""

from typing import Any

import jax
from jax import P
import numpy as np

from research.errors import check, check_range
from research.kernels.dispatch import batch_shards, place
from research.mesh import TOKENS, to_devices
from research.models.vqvae import VQVAE


def log_likelihoods(
  model: Any, codes: np.ndarray, labels: np.ndarray, *, tokenizer: VQVAE | None = None, batch: int = 128
) -> np.ndarray:
  """log p of images under classes in nats, sums over their tokens: float64, of the shape of `labels`.

  codes: int [images, tokens]. labels: int [images], or [images, n] for n classes of each image; the null class is
  number `classes`. tokenizer: VAR's, which makes what it reads. batch: pairs at a time, of which one
  program is compiled. Call it under the mesh that the model stands on. Raises UserError.
  """
  cfg, codes, labels = model.cfg, np.asarray(codes), np.asarray(labels)
  fix = f"[images, {cfg.tokens}], and labels [images] or [images, classes]"
  fits = codes.ndim == 2 and codes.shape[1] == cfg.tokens and labels.shape[:1] == codes.shape[:1] and labels.ndim <= 2
  check(fits, "codes", f"{list(codes.shape)}, labels {list(labels.shape)}", f"must be {fix}")
  check_range("codes", codes, cfg.vocab)
  check_range("labels", labels, cfg.classes + 1)
  image = np.repeat(np.arange(len(codes)), labels.size // max(len(codes), 1))
  flat, out = labels.reshape(-1).astype(np.int32), np.zeros(labels.size)
  shards = batch_shards()
  batch = -(-batch // shards) * shards
  for first in range(0, len(flat), batch):
    # the last ones again fill the last batch
    at = np.minimum(np.arange(first, first + batch), len(flat) - 1)
    rows = {"codes": codes[image[at]].astype(np.int32), "labels": flat[at]}
    values = np.asarray(jax.device_get(jax.block_until_ready(_score(model, tokenizer, to_devices(rows)))), np.float64)
    out[first : first + batch] = values[: len(flat) - first]
  return out.reshape(labels.shape)


@jax.jit
def _score(model, tokenizer, rows) -> jax.Array:
  codes = rows["codes"]
  reads = codes if tokenizer is None else place(tokenizer.inputs(place(codes, TOKENS)), P(TOKENS[0], None, None))
  return model.log_likelihood(model(reads, rows["labels"]), codes)


def of_every_class(model: Any, codes: np.ndarray, **options: Any) -> np.ndarray:
  """`log_likelihoods` under each class and, last, the null class: float64 [images, classes + 1]."""
  return log_likelihoods(model, codes, np.tile(np.arange(model.cfg.classes + 1), (len(codes), 1)), **options)


def measures(
  log_p: np.ndarray, labels: np.ndarray, tokens: int, reference: np.ndarray | None = None
) -> dict[str, float]:
  """Of images of classes `labels` [images], from `of_every_class` of a model and of the one it is compared with.

  nll, nll_null: nats a token under their class and under the null class. accuracy: of the generative classifier, the
  class under which an image is likeliest, all being as frequent. With a reference, rewards log p / p_reference in
  nats: reward_pos under the class, reward_neg a mean over all other classes, reward_null; margin, and
  reward_accuracy, how often the first is above the second, over all pairs.
  """
  own = np.arange(len(labels)), np.asarray(labels)
  out = {
    "nll": -float(np.mean(log_p[own])) / tokens,
    "nll_null": -float(np.mean(log_p[:, -1])) / tokens,
    "accuracy": float(np.mean(np.argmax(log_p[:, :-1], axis=1) == own[1])),
  }
  if reference is None:
    return out
  rewards = log_p - reference
  others = np.ones_like(rewards[:, :-1], bool)
  others[own] = False
  pos, neg = rewards[own][:, None], rewards[:, :-1][others].reshape(len(rewards), -1)
  return out | {
    "reward_pos": float(np.mean(pos)),
    "reward_neg": float(np.mean(neg)),
    "reward_null": float(np.mean(rewards[:, -1])),
    "margin": float(np.mean(pos - neg)),
    "reward_accuracy": float(np.mean(pos > neg)),
  }
