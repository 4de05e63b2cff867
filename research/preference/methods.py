"""Methods for sequence models, each a row of `METHODS`: a loss, who writes the responses, whom they meet, an update.

The policy and the frozen reference are decoders of the zoo under one mesh; responses, preferences and log-probabilities
are made inside the program of the update, without the host. For the same in a finite set see `tabular`.
"""

from collections.abc import Callable
import dataclasses

import jax
from jax import numpy as jnp

from research.generation import Sampling
from research.kernels.dispatch import regroup_rows
from research.metrics import Mean
from research.models.decoder import Decoder
from research.preference import losses
from research.preference.losses import log_prob, over_rows
from research.preference.oracles import Oracle
from research.preference.samplers import (
  GeometricMixture,
  Policy,
  Reference,
  Responses,
  Sampler,
  draw,
  repeated_rows,
  token_log_probs,
)


@dataclasses.dataclass(frozen=True)
class Method:
  """A row.

  loss: (logp, reference, preference, mask, b=...) -> [batch], of `losses`.
  y, y2: who writes the responses; y2 None: the loss takes single ones.
  opponent: who writes the response that each of them meets, so that preference is [batch, responses] (or
    [batch] without y2); None: y meets y2, and preference is [batch].
  update: a key of `updates.UPDATES`.
  """

  loss: Callable[..., jax.Array]
  y: Sampler = Policy()
  y2: Sampler | None = Policy()
  opponent: Sampler | None = None
  update: str = "plain"

  @property
  def queries(self) -> int:
    """Preferences asked per prompt and update."""
    asked = 1 if self.opponent is None or self.y2 is None else 2
    return asked * (2 if self.update == "extragradient" else 1)


# EGPO's stand-in for uniform responses: flatter, and cut to ids that are not absurd.
FLAT = Policy(Sampling(temperature=2.0, top_k=10))

METHODS: dict[str, Method] = {
  "online_ipo_uniform": Method(losses.ipo_against, FLAT, FLAT, Policy()),
  "online_ipo_policy": Method(losses.ipo),
  "ipo_md": Method(losses.ipo, GeometricMixture(), GeometricMixture()),
  "nash_md": Method(losses.ipo_against, FLAT, FLAT, GeometricMixture()),
  "nash_md_pg": Method(losses.nash_md, Policy(), None, GeometricMixture()),
  "egpo": Method(losses.ipo_against, FLAT, FLAT, Policy(), update="extragradient"),
  "optimistic": Method(losses.ipo_against, FLAT, FLAT, Policy(), update="optimistic"),
  "online_dpo": Method(losses.dpo),
  # On the last pairs only; `online` adds those before by its `memory`.
  "xpo": Method(losses.xpo, y2=Reference()),
  # The reference is to be the last iteration's policy: `online` moves it by its `refresh`.
  "sppo": Method(losses.sppo, opponent=Policy()),
}


def rollout(
  method: Method,
  oracle: Oracle,
  policy: Decoder,
  reference: Decoder,
  batch: dict[str, jax.Array],
  key: jax.Array,
  *,
  tokens: int,
  stop: tuple[int, ...] = (),
  hard: bool = False,
) -> dict[str, jax.Array]:
  """What `method` learns from: responses of `policy` and `reference` to prompts, and the oracle's preferences.

  batch: prompts int32 [batch, length], padded on the left, and lengths int32 [batch]; the oracle sees it whole as
  the prompt, so that it may carry ids of its own. hard: a preference is a coin's side.
  Returns `batch` with responses int32 and mask float32 [batch, responses, tokens], and preference.
  """
  keys = jax.random.split(key, 4)

  def make(sampler, key, count=1):
    prompts, lengths = (repeated_rows(batch[name], count) for name in ("prompts", "lengths"))
    drawn = draw(sampler, policy, reference, prompts, lengths, key, tokens=tokens, stop=stop)
    apart = jax.tree.map(lambda x: regroup_rows(x, len(x) // count, count, tokens), drawn)
    return [Responses(apart.tokens[:, i], apart.mask[:, i]) for i in range(count)]

  if method.y == method.y2:
    made = make(method.y, keys[0], 2)  # at once: half the program, and larger batches
  else:
    samplers = [s for s in (method.y, method.y2) if s is not None]
    made = [y for s, key in zip(samplers, keys, strict=False) for y in make(s, key)]
  if method.opponent is None:
    preference = oracle.prob(batch, *made)
  else:
    [opponent] = make(method.opponent, keys[2])
    preference = jnp.stack([oracle.prob(batch, y, opponent) for y in made], axis=1)
    preference = preference if method.y2 is not None else preference[:, 0]
  if hard:
    preference = jax.random.bernoulli(keys[3], preference).astype(jnp.float32)
  stacked = lambda name: jnp.stack([getattr(y, name) for y in made], axis=1)
  return batch | {"responses": stacked("tokens"), "mask": stacked("mask"), "preference": preference}


def scored(model: Decoder, batch: dict[str, jax.Array]) -> jax.Array:
  """float32 [batch, responses, tokens]: the log-probabilities of a rollout's responses under `model`."""
  size, count, length = batch["responses"].shape
  prompts, lengths = (repeated_rows(batch[name], count) for name in ("prompts", "lengths"))
  flat = Responses(*(regroup_rows(batch[name], size * count, length) for name in ("responses", "mask")))
  return regroup_rows(token_log_probs(model, prompts, lengths, flat), size, count, length)


def loss(
  method: Method, policy: Decoder, batch: dict[str, jax.Array], *, b: float, weights: jax.Array | None = None, **options
) -> dict[str, Mean]:
  """{"loss": Mean, and what to watch} on a rollout that has the reference's log-probabilities as `reference`.

  options: of the method's loss, such as `reduce` and XPO's `alpha`. weights: [batch], 0 for rows that are padding.
  Beside the loss: the log-ratio to the reference (of the policy's own responses an estimate of the KL term), the
  absolute log-probabilities of the preferred and of the other response (both can fall), and the length.
  """
  logp, mask = scored(policy, batch), batch["mask"]
  reference, preference = batch["reference"], batch["preference"]
  single = method.y2 is None
  args = [x[:, 0] if single else x for x in (logp, reference, mask)]
  rows = method.loss(args[0], args[1], preference, args[2], b=b, **options)
  totals = jax.lax.stop_gradient(log_prob(logp, mask))
  log_ratio = totals - log_prob(reference, mask)
  means = {"loss": rows, "log_ratio": log_ratio[:, 0], "length": jnp.mean(jnp.sum(mask, axis=-1), axis=1)}
  if not single:
    p = preference if preference.ndim == 1 else 0.5 + (preference[:, 0] - preference[:, 1]) / 2
    means["log_prob_preferred"] = jnp.where(p >= 0.5, totals[:, 0], totals[:, 1])
    means["log_prob_other"] = jnp.where(p >= 0.5, totals[:, 1], totals[:, 0])
  return {name: over_rows(x, weights) for name, x in means.items()}
