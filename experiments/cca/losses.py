"""What moves a pretrained p(x|c) towards guidance, as functions of log-probabilities: one row a pair.

Chen et al. (2024, arXiv 2410.09347). A row is an image x, its class c and another class c'; gaps are
`log p_theta - log p_phi` of the whole image, summed over its tokens, in float32:
`pos` under c, `neg` under c'. All return [rows], and are averaged over rows.

`same` marks rows whose pair is no mismatch: c' happens to be c, or both have been replaced by the
null class. Their second term counts as a positive of weight 1, as in the released code.
"""

from jax import nn
from jax import numpy as jnp


def cca(pos, neg, same, beta, lam):
  """-log s(beta pos) - lam log s(-beta neg), s the logistic function: noise contrastive estimation of p(x|c)/p(x).

  Without the constraint that p_theta is normalised its optimum is beta pos = log p(x|c)/p(x) - log lam: guidance of
  scale 1 / beta. With it that is reached where lam = Z(c)^beta, Z(c) = sum over x of p(x|c) (p(x|c)/p(x))^(1/beta).
  """
  return -nn.log_sigmoid(beta * pos) - jnp.where(same, nn.log_sigmoid(beta * neg), lam * nn.log_sigmoid(-beta * neg))


def unlearning(pos, neg, same, beta, lam):
  """-pos + lam neg: likelihood up, mismatched likelihood down without end (the paper's section 5.4)."""
  del beta
  return -pos - jnp.where(same, neg, -lam * neg)


def dpo(pos, neg, same, beta, lam):
  """-log s(beta (pos - neg)): Rafailov et al. (2023, arXiv 2305.18290), the class for the prompt. Only the
  difference is held, so both may fall. Pairs that are no mismatch pull at nothing, and stay in the mean.
  """
  del same, lam
  return -nn.log_sigmoid(beta * (pos - neg))


def nca(pos, neg, same, beta, lam):
  """-log s(beta pos) - 1/2 (log s(-beta pos) + log s(-beta neg)): Chen et al. (2024, arXiv 2402.05369), two responses.

  Both gaps are also held near zero, so that likelihoods cannot fall together.
  """
  del lam
  away = (nn.log_sigmoid(-beta * pos) + nn.log_sigmoid(-beta * neg)) / 2
  return -nn.log_sigmoid(beta * pos) - jnp.where(same, nn.log_sigmoid(beta * neg), away)


LOSSES = {"cca": cca, "unlearning": unlearning, "dpo": dpo, "nca": nca}
SCALED = ("cca", "unlearning")  # those that the released code divides by max(lam, 1)


def rows(name: str, pos, neg, same, *, beta: float, lam: float, masked: bool = True):
  """The loss of each row, [rows], as the released code has it.

  masked: `same` counts, and losses with a lam are divided by max(lam, 1): the branch with a share of
    null classes, which the paper's runs took. False: neither; the branch without any.
  """
  value = LOSSES[name](pos, neg, same if masked else jnp.zeros_like(same), beta, lam)
  return value / max(lam, 1.0) if masked and name in SCALED else value


def at_start(name: str, same, *, beta: float, lam: float, masked: bool = True):
  """`rows` where p_theta is p_phi: what the first step must see if the reference is where the run started."""
  zero = jnp.zeros_like(same, jnp.float32)  # stands as `same` does
  return rows(name, zero, zero, same, beta=beta, lam=lam, masked=masked)


def neighbours(labels, order=None):
  """The label [rows] that each image of a batch, all processes' together, is mismatched with.

  That of the next one, the last one's is the first's. order: a permutation of the rows, as which they stand.
  """
  if order is None:
    return jnp.roll(labels, -1)
  return jnp.zeros_like(labels).at[order].set(jnp.roll(labels[order], -1))


def negatives(labels, null, null_class: int, others=None):
  """(labels [rows], other labels [rows], same [rows]) of a batch.

  others: default those of `neighbours`. Where `null` [rows] both become the null class.
  """
  others = neighbours(labels) if others is None else others
  same = null | (others == labels)
  return jnp.where(null, null_class, labels), jnp.where(null, null_class, others), same
