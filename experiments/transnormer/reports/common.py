"""The arms' names in words."""

_NAMES = {"transnormer": "TransNormerLLM"}


def label(arm: str) -> str:
  """An arm's name in words."""
  return _NAMES.get(arm, arm)
