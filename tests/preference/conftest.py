"""What every test of a file may ask for."""

import jax
import pytest


@pytest.fixture
def float64():
  """Arrays without a dtype are float64."""
  with jax.enable_x64(True):
    yield
