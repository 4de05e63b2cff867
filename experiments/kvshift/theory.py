"""The paper's theory, in numbers: induction heads made by hand, and the loss of a head that has only its coefficients.

arXiv 2411.19574, sections 2 and 3. Two things are printed wrongly there and are derived
anew here: in table 5 the rows of tokens i-1 and T have e^{a2} where e^{a1} belongs, and
with them a term of equations 10 and 12; in the proof of theorem 2 the line "beta_0 =
1 / sigma, beta_2 = 0" stands for a score scale of 1 / sigma and beta = (1, 0).
"""

import jax
from jax import numpy as jnp
import numpy as np

from experiments.kvshift.attention import mix
from research.kernels.attention.api import attention

# [kv_heads, (previous, current)]: keys are the previous token's, values the current one's.
KEY, VALUE = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])


def induction_head(x: np.ndarray, sigma: float, slope: float = 0.0) -> np.ndarray:
  """Definition 1 on rows x [length, d]: sum over s = 2 .. L-1 of softmax(x_L x_{s-1} / sigma - slope |L - s|) x_s."""
  length = len(x)
  s = np.arange(1, length - 1)  # from 0
  scores = x[s - 1] @ x[-1] / sigma - slope * np.abs(length - 1 - s)
  weights = np.exp(scores - scores.max())
  return weights @ x[s] / weights.sum()


def one_layer(x: np.ndarray, sigma: float, slope: float = 0.0, ends: bool = False) -> np.ndarray:
  """Theorem 2's single head at the last of the rows x [length, d]: all projections the identity, KV shifting.

  Strictly a head also sees s = 1, which has no previous token, and s = L, itself. The
  definition has neither: the theorem's equality is that of `ends=False`, which masks them.
  """
  rows = jnp.asarray(x)[None, :, None]
  k, v = (np.asarray(mix(rows, jnp.asarray(c, rows.dtype), None))[0, :, 0] for c in (KEY, VALUE))
  length = len(x)
  scores = k @ x[-1] / sigma - slope * np.abs(length - 1 - np.arange(length))
  if not ends:
    scores[[0, -1]] = -np.inf
  weights = np.exp(scores - scores.max())
  return weights @ v / weights.sum()


def hand_built_accuracy(rows: list[dict[str, np.ndarray]], embedding: np.ndarray, sigma: float) -> float:
  """Of theorem 2's head on rows of the induction task, without training: embedding [vocab, d] in and out, one layer.

  Through the library's own shift and attention kernel, with both ends seen.
  """
  tokens, targets, scored = (np.stack([row[name] for row in rows]) for name in ("tokens", "targets", "scored"))

  @jax.jit
  def predict(tokens):
    x = jnp.asarray(embedding, jnp.float32)[tokens][:, :, None]
    k, v = (mix(x, jnp.asarray(c, jnp.float32), None) for c in (KEY, VALUE))
    y = attention(x, k, v, scale=1 / sigma)[:, :, 0]
    return jnp.argmax(y @ embedding.T.astype(np.float32), axis=-1)

  right = np.asarray(predict(tokens)) == targets
  return float((right * scored).sum() / scored.sum())


def flow_loss(a: np.ndarray, b: np.ndarray, others: int, misprinted: bool = False) -> np.ndarray:
  """Theorem 3's loss at a = (a1, a2), b = (b1, b2), arrays of one shape [2, ...], in nats.

  A row of T + 1 orthonormal embeddings, T = others + 4, all different but for the last,
  which repeats token i; what followed i is the answer. With all projections the identity
  the last query scores a1 at i and at itself, a2 just after i, and 0 elsewhere; values
  spread that weight over tokens as table 5 says, in its corrected form.
  """
  (a1, a2), (b1, b2) = a, b
  total = 2 * np.exp(a1) + np.exp(a2) + others + 2
  wrong = np.exp(a2 if misprinted else a1)
  answer = (b1 * np.exp(a2) + b2) / total
  repeated = (2 * b1 * np.exp(a1) + b2 * np.exp(a2)) / total
  before = (b1 + b2 * wrong) / total  # tokens i-1 and T
  other = (b1 + b2) / total
  return np.log(np.exp(answer) + np.exp(repeated) + 2 * np.exp(before) + others * np.exp(other)) - answer
