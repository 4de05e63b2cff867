"""Short strings: a small transformer plays a preference of tunable intransitivity, and every response is enumerated.

All V^L responses to each prompt are known, so that policy, best response and duality gap are exact, while training
sees nothing but samples: it is that of a language model. A game is a row of data: `quality` [L, V] of each id at each
place and `turn` [L, V, 2], the vector that each adds to its response's; a response is the sum of both, and

  P(y beats y2) = sigmoid(quality(y) - quality(y2) + turn(y) x turn(y2)),   x the cross product in the plane,

whose first part alone is Bradley-Terry's, and whose second goes in circles: what is turned a little ahead wins.
"""

import dataclasses
import functools

import jax
from jax import numpy as jnp
import numpy as np

from experiments.prefgames.strings import all_strings
from research import optim
from research.config import RunConfig
from research.data import same_batch
from research.errors import check
from research.fit import Experiment
from research.mesh import batch_shard
from research.metrics import Mean
from research.models.transformer import Transformer, flops_per_token
from research.preference import games, online, oracles
from research.preference.losses import over_rows
from research.preference.online import OnlineConfig
from research.preference.samplers import enumerated, tokenwise_mixture

PROMPT = 2  # ids of a prompt
LARGEST = 4096  # responses, so that a game's matrix stays small


@dataclasses.dataclass(frozen=True)
class SequenceConfig:
  """The games, and how the model learns to play them. Raises UserError."""

  prompts: int = 8  # a game each
  b: float = 0.1  # the weight of the games' KL terms; `online.b` is the loss's own
  cyclic: float = 1.0  # the cycle's share of the preference: 0 is Bradley-Terry's, 1 has no score at all
  strength: float = 4.0  # of the log-odds: their standard deviation is about this over random pairs
  online: OnlineConfig = OnlineConfig()

  def __post_init__(self):
    check(self.prompts >= 1, "prompts", self.prompts, "use a whole number of at least 1")
    check(self.b > 0, "b", self.b, "must be positive")
    check(0 <= self.cyclic <= 1, "cyclic", self.cyclic, "is a share, in [0, 1]")
    check(self.strength > 0, "strength", self.strength, "must be positive")


def make(cfg: RunConfig, sequence: SequenceConfig) -> Experiment:
  """Responses of `cfg.length` ids; a batch has the prompts over and over."""
  vocab = cfg.model.vocab
  fix = f"there are {vocab}^{cfg.length} responses; keep them to {LARGEST}"
  check(vocab**cfg.length <= LARGEST, "length", cfg.length, fix)
  strings, most = all_strings(vocab, cfg.length), vocab**PROMPT
  check(sequence.prompts <= most, "sequence.prompts", sequence.prompts, f"there are {most} prompts of {PROMPT} ids")
  check(cfg.batch % sequence.prompts == 0, "batch", cfg.batch, f"must be a multiple of prompts={sequence.prompts}")
  settings = dataclasses.replace(sequence.online, tokens=cfg.length)
  load = functools.partial(draw, sequence, cfg.seed, vocab, cfg.length)

  def data(split):
    copies = cfg.batch // sequence.prompts if split == "train" else 1
    rows = {name: np.concatenate([x] * copies) for name, x in load().items()}
    return same_batch(rows, shard=batch_shard(jax.sharding.get_mesh()), train=split == "train")

  def batch():
    ints = {"prompts": (PROMPT,), "lengths": ()}
    floats = {"quality": (cfg.length, vocab), "turn": (cfg.length, vocab, 2)}
    return {
      name: jax.ShapeDtypeStruct((cfg.batch, *shape), dtype)
      for shapes, dtype in ((ints, jnp.int32), (floats, jnp.float32))
      for name, shape in shapes.items()
    }

  parts = online.parts(
    settings, optim.make(cfg.tx, cfg.steps * settings.updates), lambda companion: oracle(vocab), batch, data
  )
  model_flops = flops_per_token(cfg.model, PROMPT + cfg.length)
  return Experiment(
    init=lambda key: Transformer(key, cfg.model, cfg.mesh.partition),
    data=data,
    batch=batch,
    flops_per_token={name: flops * 2 * settings.updates for name, flops in model_flops.items()},
    info=lambda: load() and {"source": "short strings", "games": sequence.prompts, "responses": len(strings)},
    **parts | {"loss": functools.partial(_loss, sequence, strings)},
  )


def oracle(vocab: int) -> oracles.Cyclic:
  """The preference; a batch brings `quality` and `turn` of its rows."""

  def of(name):
    # a comparison, not a gather: rows may be cut
    spelt = lambda y: jax.nn.one_hot(y.tokens, vocab)
    return lambda batch, y: jnp.einsum("blv,blv...->b...", spelt(y), batch[name])

  return oracles.cyclic(np.array([[0.0, 1.0], [-1.0, 0.0]]), 1.0, of("turn"), of("quality"))


def log_odds(rows: dict[str, jax.Array], strings: np.ndarray) -> jax.Array:
  """[rows, n, n]: of each response against each, for numpy's arrays or jax's."""
  xp = np if isinstance(rows["turn"], np.ndarray) else jnp
  spelt = np.eye(rows["quality"].shape[-1], dtype=rows["quality"].dtype)[strings]
  quality = xp.einsum("nlv,blv->bn", spelt, rows["quality"])
  turn = xp.einsum("nlv,blvd->bnd", spelt, rows["turn"])
  crossed = turn[:, :, None, 0] * turn[:, None, :, 1] - turn[:, :, None, 1] * turn[:, None, :, 0]
  return quality[:, :, None] - quality[:, None, :] + crossed


@functools.lru_cache(maxsize=8)
def draw(sequence: SequenceConfig, seed: int, vocab: int, length: int) -> dict[str, np.ndarray]:
  """A row a prompt: the games of a seed."""
  rng = np.random.default_rng((17, seed))
  shape = (sequence.prompts, length, vocab)
  # scaled so that the log-odds of two random responses vary by `strength`, whatever the length
  quality = rng.normal(size=shape) * (1 - sequence.cyclic) * sequence.strength / np.sqrt(2 * length)
  turn = rng.normal(size=(*shape, 2)) * np.sqrt(sequence.cyclic * sequence.strength / np.sqrt(2)) / np.sqrt(length)
  ids = all_strings(vocab, PROMPT)[rng.permutation(vocab**PROMPT)[: sequence.prompts]]
  lengths = np.full(sequence.prompts, PROMPT, np.int32)
  return {"prompts": ids, "lengths": lengths} | {
    name: x.astype(np.float32) for name, x in {"quality": quality, "turn": turn}.items()
  }


def preferences(rows: dict[str, np.ndarray], strings: np.ndarray) -> np.ndarray:
  """float64 [rows, n, n]: P of every response against every one."""
  return 1 / (1 + np.exp(-log_odds({name: rows[name].astype(np.float64) for name in ("quality", "turn")}, strings)))


def measures(sequence: SequenceConfig, strings: np.ndarray, model, reference, batch) -> dict[str, jax.Array]:
  """[rows] each, exactly: the duality gap, the original game's, KL to the reference, and the win rate against it.

  Also how far the mixture that Nash-MD meets, made token by token, is from that of whole responses (total variation).
  """
  b, c = sequence.b, sequence.online.mixture
  by_token = [enumerated(m, batch["prompts"], batch["lengths"], strings) for m in (model, reference)]
  log_policy, log_r = (jnp.sum(x, axis=-1) for x in by_token)
  whole = jax.nn.softmax((1 - c) * log_policy + c * log_r)
  vocab = batch["quality"].shape[-1]
  q = games.win_rates(jax.nn.sigmoid(log_odds(batch, strings)), log_policy)
  return {
    "gap": games.duality_gap(log_policy, log_r, q, b),
    "original": games.original_gap(q),
    "kl": games.kl(log_policy, log_r),
    "mixture_distance": jnp.sum(jnp.abs(whole - jnp.exp(tokenwise_mixture(*by_token, c, vocab))), axis=-1) / 2,
    "wins": 1 - jnp.sum(jnp.exp(log_r) * q, axis=-1),
  }


def _loss(sequence: SequenceConfig, strings: np.ndarray, model, batch, key, reference) -> dict[str, Mean]:
  """The mean duality gap over prompts, and what else `measures` has."""
  del key
  means = {name: over_rows(x) for name, x in measures(sequence, strings, model, reference, batch).items()}
  return {"loss": means["gap"], **means}
