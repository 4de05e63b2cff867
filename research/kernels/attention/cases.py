"""Shapes that models really attend with; shared by tests, benchmarks and ahead-of-time compiles."""

from typing import NamedTuple


class Case(NamedTuple):
  batch: int
  length: int
  heads: int
  kv_heads: int
  head_dim: int
  dtype: str


# What one device of a typical run holds.
CASES = {
  "nano": Case(16, 256, 4, 4, 64, "float32"),
  "lm_1.5b": Case(2, 2048, 16, 16, 128, "bfloat16"),
  "gpt2_small": Case(4, 1024, 12, 12, 64, "bfloat16"),
  "llama3_8b_shard": Case(1, 8192, 8, 2, 128, "bfloat16"),
  "image_tokens": Case(4, 1023, 16, 16, 64, "bfloat16"),
}
