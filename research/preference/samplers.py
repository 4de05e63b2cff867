"""Who writes the responses: samplers as objects, for finite sets and for sequence models alike.

A sampler says what it draws from: `logits(policy, reference)` of one choice, out of the two models' logits [..., n].
For a finite set of responses that one choice is the response. A sequence model makes it token by token, and for
the geometric mixture the two are not the same: a product of per-token mixtures, each normalised, is not the
mixture pi^(1 - c) r^c of whole responses normalised once, but for one token, or c of 0 or 1. (So it is in the
public code of Nash-MD and its successors.) Uniform over tokens is uniform over responses of one length, without stops.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import P
from jax import numpy as jnp

from research.errors import check
from research.generation import Sampling, continuations, filtered, sample
from research.kernels.dispatch import place, regroup_rows
from research.mesh import HIDDEN, TOKENS
from research.models.decoder import Decoder, log_likelihood


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tokens", "mask"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Responses:
  """tokens: int32 [batch, length]. mask: float32 of that shape, 1 up to the first stop id and at it, then 0."""

  tokens: jax.Array
  mask: jax.Array


@dataclasses.dataclass(frozen=True)
class Uniform:
  """Every one of the first `vocab` ids alike (0: of all)."""

  vocab: int = 0

  def models(self, policy: Any, reference: Any) -> tuple[Any, ...]:
    """The models whose logits are needed: none."""
    return ()

  def logits(self, policy: jax.Array, reference: jax.Array | None = None) -> jax.Array:
    """Zeros, and -inf beyond `vocab`."""
    n = policy.shape[-1]
    return jnp.broadcast_to(jnp.where(jnp.arange(n) < (self.vocab or n), 0.0, -jnp.inf), policy.shape)


@dataclasses.dataclass(frozen=True)
class Policy:
  """The policy, as `sampling` flattens and cuts it: at temperature 2 and top 10, EGPO's stand-in for uniform."""

  sampling: Sampling = Sampling()

  def models(self, policy: Any, reference: Any) -> tuple[Any, ...]:
    """The models whose logits are needed."""
    return (policy,)

  def logits(self, policy: jax.Array, reference: jax.Array | None = None) -> jax.Array:
    """The policy's, as `sampling` cuts them."""
    return _cut(policy, self.sampling)


@dataclasses.dataclass(frozen=True)
class Reference:
  """The reference model."""

  sampling: Sampling = Sampling()

  def models(self, policy: Any, reference: Any) -> tuple[Any, ...]:
    """The models whose logits are needed."""
    return (reference,)

  def logits(self, policy: jax.Array, reference: jax.Array | None = None) -> jax.Array:
    """The reference's, or the only ones there are, as `sampling` cuts them."""
    return _cut(policy if reference is None else reference, self.sampling)


@dataclasses.dataclass(frozen=True)
class GeometricMixture:
  """Proportional to pi^(1 - coefficient) r^coefficient: 0 is the policy, 1 the reference. Raises UserError."""

  coefficient: float = 0.125
  sampling: Sampling = Sampling()

  def __post_init__(self):
    check(0 <= self.coefficient <= 1, "coefficient", self.coefficient, "of a mixture lies in [0, 1]")

  def models(self, policy: Any, reference: Any) -> tuple[Any, ...]:
    """The models whose logits are needed."""
    return (policy, reference)

  def logits(self, policy: jax.Array, reference: jax.Array) -> jax.Array:
    """Mixed, then cut as `sampling` says."""
    return _cut((1 - self.coefficient) * policy + self.coefficient * reference, self.sampling)


Sampler = Uniform | Policy | Reference | GeometricMixture


def _cut(logits: jax.Array, sampling: Sampling) -> jax.Array:
  flat = filtered(logits.reshape(-1, logits.shape[-1]), sampling)
  return flat.reshape(logits.shape)


def draw(
  sampler: Sampler,
  policy: Decoder,
  reference: Decoder,
  prompts: jax.Array,
  lengths: jax.Array,
  key: jax.Array,
  *,
  tokens: int,
  stop: tuple[int, ...] = (),
) -> Responses:
  """A response of at most `tokens` ids to each prompt [batch, length], of which the last `lengths` are no padding.

  Traceable, and one program: prefill, then a token a step from the caches of the models that the sampler needs,
  no step passing through the host. Rows draw independently. Parameters get no gradient.
  """
  models = jax.lax.stop_gradient(sampler.models(policy, reference))
  whole = Sampling()  # the sampler has cut already

  def next_token(logits: list[jax.Array], key: jax.Array) -> jax.Array:
    return sample(sampler.logits(*logits), key, whole)

  if models:
    made = continuations(models, next_token, prompts, lengths, key, tokens=tokens, stop=stop)
  else:
    made = jax.random.randint(key, (len(prompts), tokens), 0, sampler.vocab or policy.cfg.vocab, jnp.int32)
  ended = jnp.isin(made, jnp.array(stop, jnp.int32))
  before = jnp.cumsum(ended, axis=1) - ended  # stop ids before this one
  return Responses(place(made, TOKENS), place((before == 0).astype(jnp.float32), TOKENS))


def token_log_probs(model: Decoder, prompts: jax.Array, lengths: jax.Array, responses: Responses) -> jax.Array:
  """float32 [batch, length of responses]: each id's log-probability after the prompt and the ids before it.

  Every position at once. What stands where the mask is 0 means nothing.
  """
  before = prompts.shape[1]
  ids = jnp.concatenate([place(prompts, TOKENS), responses.tokens], axis=1)[:, :-1]
  at = jnp.arange(ids.shape[1]) - (before - place(lengths, P(TOKENS[0]))[:, None])
  x = model(ids, (at >= 0).astype(jnp.int32), jnp.maximum(at, 0))
  return log_likelihood(model.unembed(place(x[:, before - 1 :], HIDDEN)), responses.tokens)


def enumerated(model: Decoder, prompts: jax.Array, lengths: jax.Array, strings: jax.Array) -> jax.Array:
  """float32 [batch, n, length]: the ids' log-probabilities in all n responses `strings` int32 [n, length], at once.

  Their sums over length are a policy of a finite set, for `games`, where the strings are all there are.
  """
  size, n = len(prompts), len(strings)
  ids = repeated_rows(prompts, n), repeated_rows(lengths, n)
  tokens = regroup_rows(jnp.broadcast_to(strings, (size, *strings.shape)), size * n, strings.shape[1])
  logp = token_log_probs(model, *ids, Responses(tokens, jnp.ones_like(tokens, jnp.float32)))
  return regroup_rows(logp, size, n, strings.shape[1])


def tokenwise_mixture(policy: jax.Array, reference: jax.Array, coefficient: float, vocab: int) -> jax.Array:
  """float32 [batch, n]: what `GeometricMixture` draws in `enumerated` strings, all vocab^length in order.

  Each id is mixed and normalised by itself: not the mixture of whole responses, but for one id.
  """
  batch, n, length = policy.shape
  mixed = (1 - coefficient) * policy + coefficient * reference
  total = jnp.zeros((batch, n), mixed.dtype)
  for t in range(length):
    # strings that begin alike stand together: [prefixes, the id at t, what may follow]
    here = mixed[:, :, t].reshape(batch, vocab**t, vocab, -1)
    total += jax.nn.log_softmax(here, axis=2).reshape(batch, n)
  return total


def repeated_rows(x: jax.Array, count: int) -> jax.Array:
  """Each row of `x` [batch, ...] so many times in a row, cut along the batch."""
  if count == 1:
    return x
  rows = jnp.broadcast_to(regroup_rows(x, len(x), 1, *x.shape[1:]), (len(x), count, *x.shape[1:]))
  return regroup_rows(rows, len(x) * count, *x.shape[1:])
