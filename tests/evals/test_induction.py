"""The induction score is the attention it says it is."""

import jax
import numpy as np

from research.evals.induction import induction_scores
from research.mesh import MeshConfig
from research.models.transformer import Transformer
from tests import small


@jax.tree_util.register_static
class Looks:
  """A model with five heads that attend by hand, in rows of `n` tokens said twice, and one that attends everywhere."""

  cfg = small.MODEL

  def __init__(self, n):
    self.offsets = (1 - n, -n, 2 - n, -1, 0)

  def attention_weights(self, tokens, segment_ids, positions):
    length = tokens.shape[1]
    heads = [np.eye(length, k=offset) for offset in self.offsets] + [np.tril(np.ones((length, length)))]
    weights = np.stack([h / np.maximum(h.sum(-1, keepdims=True), 1) for h in heads])
    return np.broadcast_to(weights, (1, tokens.shape[0], 6, length, length)).astype(np.float32)

  def logits(self, tokens, segment_ids, positions):
    """Knows what followed: sure in the second half, without an idea in the first."""
    rows, length = tokens.shape
    n = length // 2
    sure = 30.0 * jax.nn.one_hot(jax.numpy.roll(tokens, -1, axis=1), self.cfg.vocab)
    return sure * (jax.numpy.arange(length) >= n - 1)[None, :, None]


def test_a_model_that_shows_no_attention_has_its_losses_measured():
  class Closed:
    cfg, logits = small.MODEL, Looks.logits

  with small.use():
    out = induction_scores(jax.tree_util.register_static(Closed)(), length=8, rows=3)
  assert out.keys() == {"nats_first", "nats_second"}
  assert out["nats_second"] < 1e-3 < out["nats_first"]


def test_heads_made_by_hand_score_what_they_do():
  with small.use():
    out = induction_scores(Looks(8), length=8, rows=3)
  expected = {"induction": 0, "same": 1, "next": 2, "previous": 3}
  for name, head in expected.items():
    np.testing.assert_allclose(out[name][0, :5], np.eye(5)[head], atol=1e-6)
    assert 1 / 16 <= out[name][0, 5] <= 1 / 8
  np.testing.assert_allclose(out["nats_first"], np.log(64), rtol=1e-5)
  assert out["nats_second"] < 1e-6


def test_four_devices_measure_what_one_measures():
  mesh = MeshConfig(1, 2, 2, "fsdp_tp")
  with small.use():
    expected = induction_scores(Transformer(jax.random.key(0), small.MODEL), length=8, rows=4)
  with small.use(mesh, devices=4):
    got = induction_scores(Transformer(jax.random.key(0), small.MODEL, mesh.partition), length=8, rows=4)
  assert expected["induction"].shape == (2, 4)
  for name in expected:
    np.testing.assert_allclose(got[name], expected[name], atol=1e-5, err_msg=name)


def test_attention_weights_are_those_that_give_the_layers_output():
  batch = small.batch(rows=2)
  with small.use():
    model = Transformer(jax.random.key(0), small.MODEL)
    weights = np.asarray(model.attention_weights(batch["tokens"], batch["segment_ids"], batch["positions"]))
  assert weights.shape == (2, 2, 4, 24, 24)
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
  assert (weights[..., np.triu_indices(24, 1)[0], np.triu_indices(24, 1)[1]] == 0).all()
  other = batch["segment_ids"][:, :, None] != batch["segment_ids"][:, None, :]
  assert (np.where(other[None, :, None], weights, 0) == 0).all()
