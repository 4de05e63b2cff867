"""No number of a README differs from its record, and the page of all claims is what the READMEs say."""

import pathlib
import shutil

import pytest

from research.tools import claims

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def copy(tmp_path):
  """A checkout of what the tool reads."""
  for path in (*ROOT.glob("experiments/*/README.md"), *ROOT.glob("experiments/*/records/*.json")):
    target = tmp_path / path.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)
  (tmp_path / "docs").mkdir()
  return tmp_path


def test_every_number_of_every_claim_is_its_records_and_the_page_is_new(command):
  status, _, said = command(claims, f"--root={ROOT}", "--check")
  assert (status, said) == (0, "")


def test_four_papers_have_forty_claims_and_what_failed_is_among_them():
  found = [claim for readme in ROOT.glob("experiments/*/README.md") for claim in claims.claims(readme)]
  assert len({claim.experiment for claim in found}) >= 4
  assert len(found) >= 40
  assert sum("not reproduced" in claim.verdict for claim in found) >= 5


@pytest.mark.parametrize(
  ("experiment", "told", "changed"),
  [
    ("kvshift", "1.5291 ± 0.0156", "1.5281 ± 0.0156"),
    ("kvshift", "8.9e-16", "8.8e-16"),
    ("transnormer", "0.0677 ± 0.0493", "0.0677 ± 0.0494"),
    ("transnormer", "26,599", "26,589"),
  ],
)
def test_a_number_that_is_not_its_records_is_an_error_of_one_line(copy, command, experiment, told, changed):
  readme = copy / f"experiments/{experiment}/README.md"
  text = readme.read_text()
  assert told in text
  readme.write_text(text.replace(told, changed, 1))
  status, _, said = command(claims, f"--root={copy}")
  assert status == 1
  assert changed in said
  assert f"experiments/{experiment}/README.md:" in said
  assert len(said.splitlines()) == 1
  assert not (copy / "docs/claims.md").exists()


def test_an_old_page_is_an_error(copy, command):
  assert command(claims, f"--root={copy}")[0] == 0
  assert command(claims, f"--root={copy}", "--check")[0] == 0
  page = copy / "docs/claims.md"
  page.write_text(page.read_text().replace("reproduced", "confirmed"))
  status, _, said = command(claims, f"--root={copy}", "--check")
  assert status == 1
  assert "docs/claims.md" in said


def test_a_number_without_a_record_or_a_test_is_an_error(tmp_path):
  readme = tmp_path / "experiments/paper/README.md"
  readme.parent.mkdir(parents=True)
  rows = ["| claim | the paper | ours | verdict |", "|---|---|---|---|", "| better | yes | 0.93 | holds |"]
  readme.write_text("\n".join(["# A paper", "", "## Claims", "", *rows]))
  (claim,) = claims.claims(readme)
  assert claims.errors(claim) == ["experiments/paper/README.md:7: 0.93 has neither a record nor a test"]


@pytest.mark.parametrize(
  ("told", "value", "same"),
  [
    ("0.25", 0.2549, True),
    ("0.25", 0.2551, False),
    ("−0.10", -0.1049, True),
    ("26,599", 26598.6, True),
    ("3.89e-4", 3.8949e-4, True),
    ("3.89e-4", 3.8951e-4, False),
  ],
)
def test_a_number_is_compared_at_the_digits_it_is_told_with(told, value, same):
  assert claims._told(told, value) is same
