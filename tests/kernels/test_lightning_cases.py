"""A few hundred of the generated cases; all of them by `python -m tests.kernels.lightning_cases`."""

import pytest

from tests.kernels.lightning_cases import LIMITS, PATHS, SEEDS, SHAPES, Shape, takes, worst


def stays_within_its_limits(path, shape, dtype, seeds):
  errors = worst(path, shape, dtype, range(seeds))
  assert errors
  assert all(error <= LIMITS[kind] for kind, error in errors.items()), errors


@pytest.mark.parametrize(
  ("shape", "dtype"), [(Shape(1, 100, 3, 64, 64), "float32"), (Shape(1, 72, 1, 96, 128), "bfloat16")]
)
@pytest.mark.parametrize("path", PATHS)
def test_generated_cases_are_those_of_float64(path, shape, dtype):
  stays_within_its_limits(path, shape, dtype, 25)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("path", "shape"), [(path, shape) for path in PATHS for shape in SHAPES if takes(path, shape)])
def test_all_generated_cases_are_those_of_float64(path, shape, dtype):
  stays_within_its_limits(path, shape, dtype, SEEDS)
