"""A short form of the crash laboratory: some harm of each kind to one experiment."""

import pytest

from tests import crash_lab


def test_a_kill_and_a_flipped_bit_change_nothing(tmp_path):
  spec = "experiments/cca/configs/toy.py:tiny"
  rows = crash_lab.experiment([spec], 2, 0, tmp_path, {"SIGKILL": 1, "bit flipped": 1})
  assert [row["tries"] for row in rows] == [1, 1]
  assert all(row["differences"] == row["lost"] == 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("spec", crash_lab.CONFIGS)
def test_harm_of_every_kind_changes_nothing(tmp_path, spec):
  rows = crash_lab.experiment([spec], 12, 1, tmp_path, dict.fromkeys(crash_lab.KINDS, 2))
  assert all(row["tries"] == 2 for row in rows)
  assert all(row["differences"] == row["lost"] == 0 for row in rows)
  damaged = [row for row in rows if row["harm"] in ("bit flipped", "file cut")]
  assert all(row["noticed"] + row["harmless"] == row["tries"] for row in damaged)
