"""Shapes of real output layers; shared by tests and the benchmark."""

from typing import NamedTuple


class Case(NamedTuple):
  tokens: int
  width: int
  vocab: int


# What one device of a typical run holds.
CASES = {
  "bytes": Case(8192, 256, 4096),
  "image_tokens": Case(8192, 1024, 16384),
  "gpt2": Case(8192, 768, 50304),
  "llama3": Case(8192, 4096, 128256),
}
