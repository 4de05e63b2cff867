"""Shapes that models really attend with; shared by tests, benchmarks and ahead-of-time compiles."""

from typing import NamedTuple


class Case(NamedTuple):
  batch: int
  length: int
  heads: int
  d_k: int
  d_v: int
  dtype: str


# What one device of a typical run holds.
CASES = {
  "nano": Case(4, 256, 4, 64, 64, "float32"),
  "tnl_385m": Case(4, 2048, 8, 128, 128, "bfloat16"),
  "tnl_385m_lrpe": Case(4, 2048, 8, 256, 128, "bfloat16"),  # the first layer: phases double d_k
  "tnl_7b_shard": Case(1, 8192, 8, 128, 128, "bfloat16"),
  "nanotnl": Case(4, 1024, 12, 64, 64, "bfloat16"),
}
