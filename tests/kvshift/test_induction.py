"""The clean induction task says what it means."""

import jax
from jax import numpy as jnp
import numpy as np

from experiments.kvshift.tasks.induction import InductionConfig, InductionRows
from experiments.kvshift.tasks.rows import answer_loss

ROWS = InductionRows(InductionConfig(keys=6), vocab=40, length=32, seed=3, split="train")


def test_a_scored_position_is_always_answered_earlier_in_its_row_and_never_otherwise():
  for i in range(100):
    row = ROWS[i]
    seen = {}
    for t in range(0, 32, 2):
      key, value = row["tokens"][t], row["tokens"][t + 1]
      assert row["weights"][t] == (key in seen)
      assert seen.setdefault(key, value) == value == row["targets"][t]
      assert row["weights"][t + 1] == 0
    assert len(set(seen) | set(seen.values())) == 2 * len(seen)


def test_rows_depend_on_seed_split_and_index_only():
  again = InductionRows(InductionConfig(keys=6), 40, 32, 3, "train")
  for i in (0, 7, 99999):
    assert (ROWS[i]["tokens"] == again[i]["tokens"]).all()
  others = [
    ROWS[1],
    InductionRows(ROWS.cfg, 40, 32, 4, "train")[0],
    InductionRows(ROWS.cfg, 40, 32, 3, "validation")[0],
  ]
  for other in others:
    assert (ROWS[0]["tokens"] != other["tokens"]).any()


def test_a_model_that_looks_back_is_right_everywhere():
  class LooksBack:
    """Attends by hand: the successor of the last earlier occurrence."""

    def logits(self, tokens, segment_ids, positions):
      out = np.zeros((*tokens.shape, 40), np.float32)
      for b, row in enumerate(np.asarray(tokens)):
        for t, token in enumerate(row):
          before = np.flatnonzero(row[:t] == token)
          if before.size:
            out[b, t, row[before[-1] + 1]] = 50.0
      return jnp.asarray(out)

  batch = {name: np.stack([ROWS[i][name] for i in range(8)]) for name in ROWS[0]}
  means = answer_loss(LooksBack(), batch, jax.random.key(0))
  assert float(means["accuracy"].value) == 1
  assert float(means["loss"].value) < 1e-6
  assert float(means["loss"].weight) == batch["weights"].sum() > 0
