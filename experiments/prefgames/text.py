"""From a checkpoint and a preference dataset to policies that are compared: a stage an arm, all of one command.

sft         the chosen answers, from published weights or from nothing
judge       which of two answers is better, from the sft model: the preference that all methods learn from
online      a method of the library's table, from the sft model, which stays as the reference; its answers are
            written, judged and learnt from in one program
tournament  trains nothing: the trained models answer held-out prompts, and the judge compares them
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, Literal

import jax
from jax import numpy as jnp
import optax

from research import optim
from research.checkpoint import Checkpoints
from research.config import RunConfig
from research.data import preferences
from research.errors import UserError, check
from research.evals import win_rates
from research.fit import Experiment, TrainState
from research.generation import Sampling
from research.language_modelling import rows
from research.mesh import on_devices, shapes_of
from research.models.transformer import Transformer, flops_per_token
from research.preference import judge, online, supervised
from research.preference.losses import over_rows
from research.preference.methods import METHODS
from research.preference.online import OnlineConfig
from research.preference.samplers import Policy, Reference, draw


@dataclasses.dataclass(frozen=True)
class TextTask:
  """Which stage, and what it needs beside `model` and `data`."""

  stage: Literal["sft", "judge", "online", "tournament"] = "sft"
  online: OnlineConfig = OnlineConfig()
  judge: str = "judge"  # stage=online: the arm that trained it
  # stage=tournament: the arms that meet, those of them that are trained; how they answer is as in EGPO's public code
  players: tuple[str, ...] = ()
  prompts: int = 100
  responses: int = 10  # to each prompt
  top_k: int = 100
  top_p: float = 0.95

  def __post_init__(self):
    for name in ("prompts", "responses"):
      check(getattr(self, name) >= 1, name, getattr(self, name), "use at least 1")
    Sampling(top_k=self.top_k, top_p=self.top_p)


def make(cfg: RunConfig, task: TextTask) -> Experiment:
  """One stage. It reads no data yet, and no other arm's model."""
  cfg.model.check_mesh(dict(jax.sharding.get_abstract_mesh().shape), cfg.mesh.partition)
  length, tokens = cfg.data.length, cfg.data.response_tokens
  fix = f"must be data.prompt_tokens + data.response_tokens = {length}"
  check(cfg.length == length, "length", cfg.length, fix)
  fix = f"must be data.response_tokens={tokens}"
  check(task.stage != "online" or task.online.tokens == tokens, "text.online.tokens", task.online.tokens, fix)
  load: Callable[[], Any] = functools.cache(functools.partial(_load, cfg))
  names = ("prompts", "lengths", "weights") if task.stage == "online" else None

  def data(split):
    source = load().splits[split]
    return rows(cfg, source if names is None else _Some(source, names), split)

  def batch():
    found = preferences.abstract_rows(cfg.data, cfg.batch)
    return found if names is None else {name: found[name] for name in names}

  parts = {
    "init": functools.partial(_init, cfg),
    "data": data,
    "batch": batch,
    "info": lambda: load().info(),
    "flops_per_token": _flops(cfg, task),
  }
  return Experiment(**parts | STAGES[task.stage](cfg, task, load, batch, data))


def _init(cfg: RunConfig, key: jax.Array) -> Transformer:
  return Transformer(key, cfg.model, cfg.mesh.partition)


def _sft(cfg: RunConfig, task: TextTask, load, batch, data) -> dict[str, Any]:
  return {"loss": supervised.loss, "tx": optim.make(cfg.tx, cfg.steps)}


def _judge(cfg: RunConfig, task: TextTask, load, batch, data) -> dict[str, Any]:
  return {"loss": functools.partial(judge.loss, stop=cfg.data.stop), "tx": optim.make(cfg.tx, cfg.steps)}


def _online(cfg: RunConfig, task: TextTask, load, batch, data) -> dict[str, Any]:
  stop = cfg.data.stop
  oracle = functools.partial(judge.oracle, stop=stop)
  tx = optim.make(cfg.tx, cfg.steps * task.online.updates)
  parts = online.parts(task.online, tx, oracle, batch, data, (stop,))
  siblings: list[Callable] = []

  def companion():
    if not siblings:  # a plan asks for its shapes alone
      return _init(cfg, jax.random.key(0))
    return _trained(cfg, siblings[-1](task.judge))

  def loss(model, batch, key, reference):
    """The method's, and how often the policy's answer beats the reference's by the judge."""
    start, judged_by = reference
    write = functools.partial(draw, tokens=task.online.tokens, stop=(stop,))
    keys = jax.random.split(key, 3)
    ask = (model, start, batch["prompts"], batch["lengths"])
    p = oracle(judged_by).prob(batch, write(Policy(), *ask, keys[0]), write(Reference(), *ask, keys[1]))
    return parts["loss"](model, batch, keys[2], reference) | {"win_rate": over_rows(p, batch["weights"])}

  return parts | {"loss": loss, "companion": companion, "prepare": siblings.append}


def _tournament(cfg: RunConfig, task: TextTask, load, batch, data) -> dict[str, Any]:
  siblings: list[Callable] = []

  def wins(model):
    """Of all pairs of players, by `model`, the judge: rates, and their standard errors."""
    source = load().splits["validation"].distinct(task.prompts)
    batches = list(rows(cfg, source, "validation"))
    options = {"tokens": cfg.data.response_tokens, "stop": (cfg.data.stop,), "seed": cfg.seed}
    sampling = Sampling(top_k=task.top_k, top_p=task.top_p)
    made = {}
    for i, name in enumerate(task.players):
      try:
        directory = siblings[-1](name)
      except UserError:  # the command left it out
        continue
      player = _trained(cfg, directory)
      made[name] = win_rates.responses(player, batches, each=task.responses, sampling=sampling, player=i, **options)
    found = win_rates.matrix(judge.oracle(model, cfg.data.stop), batches, made)
    rates = {f"rate/{a}/{b}": rate for (a, b), (rate, _) in found.items()}
    return rates | {f"error/{a}/{b}": error for (a, b), (_, error) in found.items()} | {"prompts": len(source)}

  return {
    "loss": functools.partial(judge.loss, stop=cfg.data.stop),
    "tx": optax.identity(),
    "train_step": _stay,
    "prepare": siblings.append,
    "evals": {"wins": wins},
  }


def _stay(exp: Experiment, cfg: RunConfig, state: TrainState, batch, reference=None):
  """A step that changes nothing."""
  zero = jnp.zeros(())
  return dataclasses.replace(state, step=state.step + 1), {"loss": zero, "grad_norm": zero, "update_norm": zero}


STAGES = {"sft": _sft, "judge": _judge, "online": _online, "tournament": _tournament}


def _trained(cfg: RunConfig, directory) -> Transformer:
  """The newest model of another arm, on the current mesh."""
  model = on_devices(shapes_of(functools.partial(_init, cfg)))
  return Checkpoints(directory).restore({"model": model}, partial=True).state["model"]


def _flops(cfg: RunConfig, task: TextTask) -> dict[str, float]:
  """Model FLOPs of a step over its tokens, `length` a row, by what they are spent on; training is three passes."""
  once = sum(flops_per_token(cfg.model, cfg.length).values()) / 3
  reading = cfg.data.prompt_tokens + 2 * cfg.data.response_tokens + 2  # a pair, as the judge reads it
  pair = once * reading / cfg.length
  if task.stage == "sft":
    return flops_per_token(cfg.model, cfg.length)
  if task.stage != "online":
    return {"judge": 3 * 2 * pair}
  row = METHODS[task.online.method]
  gradients = (2 if row.update == "extragradient" else 1) * task.online.updates
  learnt = 1 if row.y2 is None else 2
  written = learnt + (row.opponent is not None)
  return {
    "policy": 3 * learnt * gradients * once,
    "reference": learnt * gradients * once,
    "responses": written * gradients * once,
    "judge": 2 * row.queries * task.online.updates * pair,
  }


class _Some:
  """Rows with some of their arrays."""

  def __init__(self, rows, names: tuple[str, ...]):
    self.rows, self.names = rows, names

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, i: int):
    row = self.rows[i]
    return {name: row[name] for name in self.names}


def _load(cfg: RunConfig) -> preferences.PreferenceData:
  try:
    found = preferences.load(cfg.data)
  except UserError as e:
    raise e.under("data") from None
  needed, name = found.tokenizer.vocab, found.tokenizer.name
  check(needed <= cfg.model.vocab, "model.vocab", cfg.model.vocab, f"tokenizer {name} needs at least {needed}")
  return found
