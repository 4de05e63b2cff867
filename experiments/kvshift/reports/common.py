"""What the reports share: the arms' names in words, and how a report ends."""

import pathlib

_NAMES = {"plain": "plain attention", "kvshift": "KV shifting"}


def label(arm: str) -> str:
  """An arm's name in words: "kvshift-2" is the attention and whatever the config added."""
  attention, _, rest = arm.partition("-")
  name = _NAMES.get(attention, attention)
  return f"{name}, {rest}" if rest else name


def finish(workdir: pathlib.Path, fig, name: str, table: str) -> None:
  """Writes the figure to report/`name` and prints the table and where everything is."""
  path = workdir / "report" / name
  fig.savefig(path, dpi=150)
  print(f"\n{table}\n\nfigure:  {path}\nresults: {workdir / 'report' / 'results.json'}")
