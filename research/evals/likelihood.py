"""How likely a model finds text: log-likelihoods of continuations, perplexity of documents."""

from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
import numpy as np

from research.errors import check, check_range
from research.kernels.cross_entropy.api import row_cross_entropy
from research.kernels.dispatch import batch_shards
from research.mesh import to_devices
from research.models.decoder import Decoder, next_token_loss

_MULTIPLE = 64  # rows are padded to multiples of it, so that few lengths are compiled


def log_likelihoods(
  model: Decoder, rows: Sequence[tuple[Sequence[int], int]], *, max_length: int, batch: int = 16
) -> np.ndarray:
  """float64 [rows]: the log-likelihood in nats of ids[start:] after ids[:start], for each (ids, start).

  Rows longer than `max_length` lose ids at their front, as far as the continuation allows.
  Call it under the mesh that the model stands on. Raises UserError where nothing precedes
  a continuation, or it is too long.
  """
  for ids, start in rows:
    check(
      0 < start < len(ids), "continuation", f"{start} of {len(ids)} ids", "needs an id before it and one of its own"
    )
    check(len(ids) - start < max_length, "continuation", f"{len(ids) - start} ids", f"does not fit into {max_length}")
    check_range("ids", np.asarray(ids), model.cfg.vocab)
  rows = [(list(ids)[-max_length:], start - max(len(ids) - max_length, 0)) for ids, start in rows]
  shards = batch_shards()
  batch = -(-batch // shards) * shards
  out = np.zeros(len(rows))
  by_length = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
  for first in range(0, len(rows), batch):
    chosen = by_length[first : first + batch]
    length = -(-(len(rows[chosen[-1]][0]) - 1) // _MULTIPLE) * _MULTIPLE
    filled = {name: np.zeros((batch, length), np.int32) for name in ("tokens", "targets", "segment_ids")}
    weights = np.zeros((batch, length), np.float32)
    for j, i in enumerate(chosen):
      ids, start = rows[i]
      n = len(ids) - 1
      filled["tokens"][j, :n], filled["targets"][j, :n], filled["segment_ids"][j, :n] = ids[:-1], ids[1:], 1
      weights[j, start - 1 : n] = 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    values = _row_sums(model, to_devices({**filled, "positions": positions, "weights": weights}))
    out[chosen] = -np.asarray(jax.device_get(values), np.float64)[: len(chosen)]
  return out


@jax.jit
def _row_sums(model, batch) -> jax.Array:
  """Cross-entropy in nats of each row, summed where it has weight."""
  x = model(batch["tokens"], batch["segment_ids"], batch["positions"])
  return row_cross_entropy(x, model.head_weight(), batch["targets"], batch["weights"])


def perplexity(model: Decoder, data: Any, bytes_of_text: int) -> dict[str, float]:
  """Of all rows of `data`, a grain.IterDataset of packed batches that stand for `bytes_of_text` bytes.

  nats_per_token, perplexity (its exponential), bits_per_byte, tokens.
  """
  means = jax.jit(functools.partial(next_token_loss, key=jax.random.key(0)))
  total = weight = 0.0
  for rows in data:
    loss = jax.block_until_ready(means(model, to_devices(rows)))["loss"]
    total, weight = total + float(loss.total), weight + float(loss.weight)
  nats = total / weight
  bits = total / math.log(2) / bytes_of_text
  return {"nats_per_token": nats, "perplexity": math.exp(min(nats, 700)), "bits_per_byte": bits, "tokens": int(weight)}
