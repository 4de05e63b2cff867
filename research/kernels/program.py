"""What the `cases.py` of an op with a TPU kernel offers to `launch.kernels`: programs that hold its kernels.

    def programs(case) -> dict[str, Program]

The first is ours; others are peers that do the same job.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax


class Program(NamedTuple):
  """A function to compile for one chip, and its operands."""

  call: Callable
  operands: tuple[jax.ShapeDtypeStruct, ...]
  share: float = 1.0  # of the steps of a kernel's grid that compute; a causal mask skips the others
