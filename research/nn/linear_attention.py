"""Gated linear attention with exponential decay, and what goes with it: rates of decay, phases, activations.

TransNormerLLM (Qin et al., 2023, arXiv 2307.14995).
"""

from collections.abc import Callable
import math

from flax import nnx
import jax
from jax import P
from jax import numpy as jnp
import numpy as np

from research.kernels import dispatch
from research.kernels.attention.api import HEADS
from research.kernels.lightning_attention.api import lightning_attention
from research.kernels.lightning_attention.features import activate, phases
from research.kernels.lightning_attention.gated import FUSED, gated_lightning_attention
from research.kernels.lightning_attention.step import step
from research.mesh import BATCH, HIDDEN, Partition
from research.nn.init import fan_in
from research.nn.norms import NORMS, SRMSNorm
from research.nn.precision import Policy


def decay_rates(kind: str, heads: int, layers: int, temperature: bool = True) -> np.ndarray:
  """float64 [layers, heads]: a head's state shrinks by exp(-rate) a token. Heads h and layers l count from 0.

  paper: 8 h / heads * (1 - l / layers), equation 10; the first head never forgets.
  released: the slopes of ALiBi (Press et al., 2021, arXiv 2108.12409), 2^(-8 (h + 1) / heads) for a
    power of two, times 1 - l / (layers - 1) + 1e-5: what the released code and checkpoints have, in which
    the heads that forget fastest come first and forget far slower than in the paper.
  none: 0.

  Without `temperature` every layer has the rates of the first (without the 1e-5).
  """
  layer = np.arange(layers)[:, None]
  if kind == "paper":
    slopes, factor = 8 * np.arange(heads) / heads, 1 - layer / layers
  elif kind == "released":
    slopes, factor = np.array(_alibi(heads)), 1 - layer / max(layers - 1, 1) + 1e-5
  else:
    slopes, factor = np.zeros(heads), np.ones((layers, 1))
  return slopes * (factor if temperature else np.ones((layers, 1)))


def _alibi(heads: int) -> list[float]:
  """Slopes of any number of heads; past a power of two every other slope of twice as many fills up."""
  power = 2 ** int(math.log2(heads))
  slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
  return slopes if power == heads else slopes + _alibi(2 * power)[::2][: heads - power]


class GatedLinearAttention(nnx.Module):
  """out(norm(attention(act(q), act(k), v)) * u), equation 11; the norm is over all heads together.

  q, k, v and the gate u are one matrix [width, heads, 4, head_dim] (3 without the gate), so
  that cutting heads along the mesh axis `model` keeps every head whole; the norm's sum is
  then the one thing, beside the output's, that crosses the cut.

  With `lrpe` queries and keys get learnt phases, and the state becomes twice as tall.
  """

  def __init__(
    self,
    key: jax.Array,
    *,
    width: int,
    heads: int,
    head_dim: int,
    lrpe: bool,
    gate: bool,
    activation: str,
    norm: str,
    norm_eps: float,
    partition: Partition,
    policy: Policy,
    implementation: str | Callable | None = None,
  ):
    in_key, out_key = jax.random.split(key)
    inner = heads * head_dim
    shape = (width, heads, 4 if gate else 3, head_dim)
    self.qkvu = nnx.Param(
      fan_in(in_key, shape, width, policy.params, partition.qkv), matrix=((-4,), (-1,))
    )  # for Muon every head is a matrix of its own
    self.out = nnx.Param(fan_in(out_key, (inner, width), inner, policy.params, partition.down), matrix=((-2,), (-1,)))
    self.norm = NORMS[norm](inner, norm_eps, policy)
    if lrpe:
      theta = 10000 ** (-2 * np.arange(inner) / inner)  # falls over all heads together
      theta = jnp.asarray(theta.reshape(heads, head_dim), policy.params)
      self.theta = nnx.Param(jax.reshard(theta, partition.per_head))
    else:
      self.theta = None
    self.gate, self.activation, self.implementation, self.policy = gate, activation, implementation, policy

  def __call__(
    self,
    x: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
    decay: jax.Array,
    state: tuple[jax.Array, jax.Array] | None = None,
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """x [batch, length, width], after `state`, if any -> [batch, length, width] and the state after it.

    segment_ids, positions: int32 [batch, length]. decay: float32 [heads].
    state: two float32 [batch, heads, head_dim, or twice that with phases, head_dim], of which the
      second is what the first rounds off; of the segment that x begins with.
    """
    batch, length, width = x.shape
    # Behind a barrier, or a TPU transposes the gradient of y to make that of the parameter in its own layout.
    weight = self.policy.weight(self.qkvu[...])
    shape = weight.shape[1:]
    weight = jax.lax.optimization_barrier(weight.reshape(width, -1, out_sharding=P(None, "model")))
    qkvu = jnp.einsum("btd,df->btf", x, weight).reshape(batch, length, *shape, out_sharding=FUSED)
    if isinstance(self.norm, SRMSNorm) and (state is None or length > 1):
      y, state = self._fused(qkvu, segment_ids, positions, decay, state)
    else:
      y, state = self._by_parts(qkvu, segment_ids, positions, decay, state)
    return jnp.einsum("btf,fd->btd", y, self.policy.weight(self.out[...]), out_sharding=HIDDEN), state

  def _fused(self, qkvu, segment_ids, positions, decay, state):
    """The norm is a number a token, so the gate can come first; only that number waits for all heads."""
    y, squares, after = gated_lightning_attention(
      qkvu,
      decay,
      activation=self.activation,
      theta=None if self.theta is None else self.theta[...],
      positions=positions,
      segment_ids=segment_ids,
      initial_state=None if state is None else state[0] + state[1],
      implementation=self.implementation,
    )
    factor = self.norm.factor(squares.sum(-1, keepdims=True))
    y = _join_heads(y)
    return (y * factor).astype(y.dtype), (after, jnp.zeros_like(after))

  def _by_parts(self, qkvu, segment_ids, positions, decay, state):
    # split, not indexing: its transpose is one concatenation instead of padded sums
    q, k, v, *u = (jnp.squeeze(z, 3) for z in jnp.split(qkvu, qkvu.shape[3], axis=3))
    q, k = (activate(self.activation, z) for z in (q, k))
    if self.theta is not None:
      theta = dispatch.place(self.theta[...], P("model", None))
      q, k = (phases(dispatch.place(z, HEADS), positions, theta) for z in (q, k))
    if state is not None and q.shape[1] == 1:
      y, *state = step(q, k, v, decay, *state)
    else:
      before = None if state is None else state[0] + state[1]
      y, after = lightning_attention(
        q, k, v, decay, segment_ids=segment_ids, initial_state=before, implementation=self.implementation
      )
      state = after, jnp.zeros_like(after)
    y, *u = (_join_heads(z) for z in (y, *u))
    y = self.norm(y)
    return u[0] * y if self.gate else y, tuple(state)


def _join_heads(x: jax.Array) -> jax.Array:
  """[batch, length, heads, d] -> [batch, length, heads * d]; of one row, a reshape forgets where it stands."""
  return dispatch.place(x.reshape(*x.shape[:2], -1), P(BATCH, None, "model"))
