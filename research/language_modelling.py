"""Experiments on text: the parts of one that trains a decoder on the next token."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax

from research import data, optim
from research.config import RunConfig
from research.errors import UserError, check
from research.fit import Experiment
from research.mesh import batch_shard
from research.models.decoder import Decoder, next_token_loss


def language_modelling(
  cfg: RunConfig, init: Callable[[jax.Array], Decoder], flops_per_token: Mapping[str, float]
) -> Experiment:
  """The next token of `cfg.data`, a `research.data.TextConfig`, by the decoder of `init` with `cfg.model.vocab` ids.

  Reads no data yet. Raises UserError, once it is read, for what is wrong with it.
  """
  text: Callable[[], Any] = functools.cache(functools.partial(_load, cfg))
  return Experiment(
    init=init,
    loss=next_token_loss,
    data=lambda split: rows(cfg, text().split(split), split),
    batch=functools.partial(data.abstract_rows, cfg.batch, cfg.length),
    tx=optim.make(cfg.tx, cfg.steps),
    flops_per_token=flops_per_token,
    info=lambda: text().info(),
  )


def rows(cfg: RunConfig, source: Any, split: str) -> Any:
  """This process's batches of `source`, random access to the rows of `split`, under the current mesh."""
  shard = batch_shard(jax.sharding.get_mesh())
  return data.batches(source, cfg.batch, seed=cfg.seed, shard=shard, train=split == "train")


def _load(cfg: RunConfig) -> data.TextData:
  try:
    text = data.load(cfg.data, cfg.length, cfg.seed)
  except UserError as e:
    raise e.under("data") from None
  needed, name = text.tokenizer.vocab, text.tokenizer.name
  check(needed <= cfg.model.vocab, "model.vocab", cfg.model.vocab, f"tokenizer {name} needs at least {needed}")
  return text
