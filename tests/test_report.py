"""What reports share."""

import json
import math

import numpy as np
import pytest

from experiments.kvshift.experiment import Config
from research import manifest, report


def test_a_number_that_is_not_finite_is_null_in_the_results(tmp_path):
  manifest.open_workdir(tmp_path, Config(), "main.py", [], {}, trains=True)
  (tmp_path / "report").mkdir()
  values = {"a": math.nan, "b": [1.0, -math.inf, {"c": (np.float64("nan"), 2)}], "d": "NaN", "e": None}
  path = report.write_results(tmp_path, values)
  read = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
  assert read["results"] == {"a": None, "b": [1.0, None, {"c": [None, 2]}], "d": "NaN", "e": None}
