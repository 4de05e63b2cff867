"""A short form of the crash laboratory: some harm of each kind to one experiment."""

import json
import pathlib

import pytest

from tests import crash_lab

ROOT = pathlib.Path(__file__).parents[1]


def test_a_kill_and_a_flipped_bit_change_nothing(tmp_path):
  spec = "experiments/cca/configs/toy.py:tiny"
  rows = crash_lab.experiment([spec], 2, 0, tmp_path, {"SIGKILL": 1, "bit flipped": 1})
  assert [row["tries"] for row in rows] == [1, 1]
  assert crash_lab.wrong(rows) == 0


def test_the_page_has_the_table_of_the_record():
  record = json.loads((ROOT / "benchmarks/records/crash_lab.json").read_text())
  assert crash_lab.summary(record["rows"]) in (ROOT / "docs/reliability.md").read_text()
  assert crash_lab.wrong(record["rows"]) == 0
  assert sum(row["tries"] for row in record["rows"] if row["harm"] == "SIGKILL") >= 200


@pytest.mark.slow
@pytest.mark.parametrize("spec", crash_lab.CONFIGS)
def test_harm_of_every_kind_changes_nothing(tmp_path, spec):
  rows = crash_lab.experiment([spec], 12, 1, tmp_path, dict.fromkeys(crash_lab.KINDS, 2))
  assert all(row["tries"] == 2 for row in rows)
  assert crash_lab.wrong(rows) == 0
