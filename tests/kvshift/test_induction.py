"""Both induction generators say what they mean."""

import pathlib

import numpy as np
import pytest

from experiments.kvshift.tasks.induction import InductionConfig, InductionRows, literal_rule

ROWS = InductionRows(InductionConfig(keys=6), vocab=40, length=32, seed=3, split="train")
LITERAL = InductionRows(InductionConfig(generator="paper", keys=48), vocab=64, length=64, seed=3, split="train")
GOLDEN = np.load(pathlib.Path(__file__).parent / "goldens" / "induction.npz")


def test_a_scored_position_is_always_answered_earlier_in_its_row_and_never_otherwise():
  for i in range(100):
    row = ROWS[i]
    seen = {}
    for t in range(0, 32, 2):
      key, value = row["tokens"][t], row["tokens"][t + 1]
      assert row["weights"][t] == row["scored"][t] == (key in seen)
      assert seen.setdefault(key, value) == value == row["targets"][t]
      assert row["weights"][t + 1] == 0
    assert len(set(seen) | set(seen.values())) == 2 * len(seen)


@pytest.mark.parametrize("case", sorted({name.rsplit("/", 1)[0] for name in GOLDEN}))
def test_the_papers_rule_continues_the_papers_own_draws_as_its_listing_does(case):
  sequence, repeats = GOLDEN[f"{case}/sequence_raw"], GOLDEN[f"{case}/repeat_positions_all"].tolist()
  forced = {r + 1 for r in repeats}
  draws = iter([int(t) for i, t in enumerate(sequence) if i not in forced])
  length = len(sequence) - (len(sequence) % 2 == 1 and len(sequence) - 2 in repeats)  # the last pair may overhang
  row, at = literal_rule(draws, length)
  assert row == sequence.tolist()
  assert at == repeats
  first = int(GOLDEN[f"{case}/first_repeat_position"])
  assert at[0] == first
  assert row[first + 1] == GOLDEN[f"{case}/first_repeat_target"]


def test_of_the_papers_rows_the_first_repetition_is_scored_and_no_false_token_is_learnt_from():
  inconsistent = total = 0
  for i in range(200):
    row = LITERAL[i]
    tokens, (first,) = row["tokens"], np.flatnonzero(row["scored"])
    assert len(set(tokens[:first])) == first  # nothing stood twice before it
    before = np.flatnonzero(tokens[:first] == tokens[first])
    assert len(before) == 1
    assert row["targets"][first] == tokens[first + 1] == tokens[before[0] + 1]
    assert row["weights"][first] == 1
    assert set(np.unique(row["weights"])) <= {0, 1}
    assert 40 < row["weights"].sum() <= 63
    for t in np.flatnonzero(row["weights"]):
      earlier = np.flatnonzero(tokens[:t] == tokens[t])
      if t > first and len(earlier):
        total += 1
        inconsistent += row["targets"][t] != tokens[earlier[-1] + 1]
  assert inconsistent / total > 0.1  # why only the first is scored


@pytest.mark.parametrize("rows", [ROWS, LITERAL], ids=["clean", "paper"])
def test_rows_depend_on_seed_split_and_index_only(rows):
  make = lambda seed, split: InductionRows(rows.cfg, rows.vocab, rows.length, seed, split)
  for i in (0, 7, 99999):
    assert (rows[i]["tokens"] == make(3, "train")[i]["tokens"]).all()
  for other in (rows[1], make(4, "train")[0], make(3, "validation")[0]):
    assert (rows[0]["tokens"] != other["tokens"]).any()
