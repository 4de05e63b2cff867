"""Every claim of every paper, with its record: `python -m research.tools.claims` writes docs/claims.md.

The claims are the rows of the table under "## Claims" in experiments/*/README.md (claim, what the paper has, ours,
verdict); a row names the records that its numbers come from as [record](records/NAME.json). Fails, in one line for
each, where a number differs from the records of its row. `--check` writes nothing and also fails where docs/claims.md
is old.
"""

from collections.abc import Iterator
import dataclasses
import json
import math
import pathlib
import re
import sys
from typing import Any

import numpy as np

from research import run

_NUMBER = re.compile(r"(?<![\w.^/-])[−-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?(?![\w^]|\.\d)")
_SPREAD = re.compile(r"(−?\d+\.\d+) ± (\d+\.\d+)")
_RECORD = re.compile(r"\]\(records/(\w+)\.json\)")
_LINK = re.compile(r"\]\((?!https?://|#)([^)]+)\)")


@dataclasses.dataclass(frozen=True)
class Claim:
  """A row of a table of claims; its cells are Markdown. `records` maps the names of its records to what they hold."""

  experiment: str
  line: int  # of the README, from 1
  claim: str
  paper: str
  ours: str
  verdict: str
  records: dict[str, dict[str, Any]]


def main() -> None:
  parser = run.Parser(prog="python -m research.tools.claims", description=__doc__.split("\n")[0])
  parser.add_argument("--root", default=".", metavar="DIR", help="a checkout of the project")
  parser.add_argument("--check", action="store_true", help="write nothing")
  args = parser.parse_args()
  root = pathlib.Path(args.root)
  found = [claim for readme in sorted(root.glob("experiments/*/README.md")) for claim in claims(readme)]
  wrong = [error for claim in found for error in errors(claim)]
  page, written = page_of(found), root / "docs/claims.md"
  if args.check and (not written.exists() or written.read_text() != page):
    wrong.append("docs/claims.md: is not what the READMEs and records say; run python -m research.tools.claims")
  elif not args.check and not wrong:
    written.write_text(page)
  for error in wrong:
    print(error, file=sys.stderr)
  print(f"{len(found)} claims, {len(wrong)} errors")
  if wrong:
    sys.exit(1)


def claims(readme: pathlib.Path) -> list[Claim]:
  """The rows of a README's table of claims, with the records that they name."""
  out, inside = [], False
  for number, line in enumerate(readme.read_text().splitlines(), 1):
    inside = line == "## Claims" if line.startswith("## ") else inside
    cells = [cell.strip() for cell in line.strip("|").split(" | ")] if inside and line.startswith("| ") else []
    if len(cells) == 4 and cells[0] != "claim":
      records = {
        name: json.loads((readme.parent / f"records/{name}.json").read_text()) for name in _RECORD.findall(line)
      }
      out.append(Claim(readme.parent.name, number, *cells, records))
  return out


def errors(claim: Claim) -> list[str]:
  """What of a claim's own numbers is in none of its records, a line each.

  Checked are means with deviations, and every number with a decimal point, an exponent or a thousands separator; whole
  numbers below 1,000 are mostly settings, and are not.
  """
  where = f"experiments/{claim.experiment}/README.md:{claim.line}: "
  text, out = re.sub(r"\[[^]]*\]\([^)]*\)|`[^`]*`|Python \d\.\d+", " ", claim.ours), []
  if not claim.records:
    bare = [told for told in _NUMBER.findall(text) if re.search("[.,e]", told)]
    tested = re.search(r"\btests\b", claim.ours)
    return [] if tested or not bare else [f"{where}{bare[0]} has neither a record nor a test"]
  known = [value for record in claim.records.values() for value in numbers(record["results"])]
  pairs = {pair for record in claim.records.values() for pair in spreads(record["results"])}
  for mean, deviation in _SPREAD.findall(text):
    if not any(_told(mean, m) and _told(deviation, s) for m, s in pairs):
      out.append(f"{where}{mean} ± {deviation} is in no record of its row ({', '.join(claim.records)})")
  text = _SPREAD.sub(" ", text)
  for told in _NUMBER.findall(text):
    if re.search("[.,e]", told) and not any(_told(told, value) for value in known):
      out.append(f"{where}{told} is in no record of its row ({', '.join(claim.records)})")
  return out


def spreads(tree: Any) -> Iterator[tuple[float, float]]:
  """(mean, standard deviation) of every list or {seed: number} in a record."""
  for values in _groups(tree):
    yield float(np.mean(values)), float(np.std(values, ddof=1))


def numbers(tree: Any) -> Iterator[float]:
  """Every number of a record, and mean, least and largest of every list or {seed: number}; shares as percent too.

  Keys that are numbers count: they are settings.
  """
  if isinstance(tree, dict | list):
    for values in _groups(tree, deep=False):
      yield from (float(np.mean(values)), min(values), max(values), float(np.median(values)))
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
      if isinstance(key, str) and re.fullmatch(r"\d+(\.\d+)?", key):
        yield float(key)
      yield from numbers(value)
  elif isinstance(tree, int | float) and not isinstance(tree, bool):
    yield float(tree)
    if 0 < abs(tree) < 1:
      yield 100 * float(tree)
  elif isinstance(tree, str) and re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", tree):
    yield float(tree)


def _groups(tree: Any, deep: bool = True) -> Iterator[list[float]]:
  if not isinstance(tree, dict | list):
    return
  values = list(tree.values()) if isinstance(tree, dict) else tree
  if len(values) > 1 and all(isinstance(v, list) and len(v) == len(values[0]) for v in values):
    for column in zip(*values, strict=True):  # of {seed: [a number for each setting]}
      yield from _groups(list(column), deep=False)
  finite = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
  if len(values) > 1 and len(finite) == len(values):
    yield finite
  if deep:
    for value in values:
      yield from _groups(value)


def _told(text: str, value: float) -> bool:
  """Whether `value`, to as many digits as `text` has, is `text`."""
  text = text.replace("−", "-").replace(",", "")
  digits, _, exponent = text.partition("e")
  decimals = len(digits.partition(".")[2])
  step = 10.0 ** (int(exponent or 0) - decimals)
  return abs(float(text) - value) <= step * 0.5000001


def page_of(found: list[Claim]) -> str:
  """docs/claims.md."""
  out = [
    "# Claims",
    "",
    f"All {len(found)} claims of the papers' pages, with the verdicts there and where our numbers come from.",
    "Made by `python -m research.tools.claims`, which fails when a number differs from its record; to change a row, "
    "change the experiment's README.",
  ]
  for experiment in dict.fromkeys(claim.experiment for claim in found):
    rows = []
    for claim in (c for c in found if c.experiment == experiment):
      told = (claim.claim, claim.paper, claim.ours, claim.verdict)
      rows.append([*(_relinked(cell, experiment) for cell in told), _provenance(claim)])
    header = ["claim", "the paper", "ours", "verdict", "command, seeds, hardware, commit"]
    out += ["", f"## [{experiment}](../experiments/{experiment}/README.md)", "", _markdown(header, rows)]
  return "\n".join(out) + "\n"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
  line = lambda cells: "| " + " | ".join(cells) + " |"
  return "\n".join([line(header), "|---" * len(header) + "|", *map(line, rows)])


def _relinked(cell: str, experiment: str) -> str:
  """Links of a README as seen from docs/."""
  return _LINK.sub(lambda m: f"](../experiments/{experiment}/{m[1]})", cell)


def _provenance(claim: Claim) -> str:
  of_each = []
  for record in claim.records.values():
    hardware = record["hardware"]
    seeds = ", ".join(map(str, record["seeds"]))
    device = hardware["devices"]["kind"]
    machine = f"{hardware['cores']} cores of {hardware['cpu']}" if device == "cpu" else device
    of_each.append(f"`{record['command']}`; seeds {seeds}; {machine}; {record['commit']['commit'][:12]}")
  return "<br>".join(of_each) or "no run"


if __name__ == "__main__":
  run.guard(main)
