"""A directory of checkpoints, made once for the tests of a file."""

import pathlib
import shutil

import pytest

from research.checkpoint import Checkpoints
from tests.checkpoint.states import State, make_state


@pytest.fixture(scope="module")
def states() -> dict[int, State]:
  return {step: make_state(step) for step in (10, 20)}


@pytest.fixture(scope="module")
def sound(states, tmp_path_factory) -> pathlib.Path:
  """A directory with steps 10 and 20; copy it before damaging it."""
  directory = tmp_path_factory.mktemp("sound")
  with Checkpoints(directory) as ckpt:
    for step, state in states.items():
      ckpt.save(step, state, {"position": [step, None, 0.1]}, {"commit": "abc", "nested": {"é": step}})
  return directory


@pytest.fixture
def copy(sound, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(sound, tmp_path / "run"))
