"""What the reports share: the arms' names in words, and what is measured."""

from research import paths
from research import report as parts

_NAMES = {
  "plain": "plain attention",
  "kvshift": "KV shifting",
  "gate": "gate: a1 = sigmoid",
  "clip": "coefficients in 0 .. 1",
  "konly": "shift of keys only",
  "vonly": "shift of values only",
  "window3": "window of 3",
  "window4": "window of 4",
  "qkv": "QKV shifting",
  "identity": "KV shifting from (0, 1)",
  "half": "KV shifting from (½, ½)",
  "previous": "KV shifting from (1, 0)",
  "conv": "convolution of k, v (width 4)",
  "canon": "Canon-B",
}
# What is measured, the best for a task first, in words.
MEASURES = {"rows_right": "whole solutions right", "accuracy": "accuracy", "loss": "validation loss (nats / token)"}


def label(arm: str) -> str:
  """An arm's name in words: "kvshift-2" is the attention and whatever the config added."""
  attention, _, rest = arm.partition("-")
  name = _NAMES.get(attention, attention)
  return f"{name}, {rest}" if rest else name


def measured(workdir: paths.Path) -> tuple[str, dict]:
  """(the name of what a workdir's task is judged by, its curves)."""
  for metric in MEASURES:
    curves = parts.curves(workdir, metric, needed=metric == "loss")
    if curves:
      return metric, curves
  raise AssertionError("unreachable: every run has a loss")
