"""A step of a finished run can be taken again to the bit, and the document behind its loss be named."""

import json
import pathlib
import re
import sys
import sysconfig

import pytest

from experiments.kvshift.__main__ import build, report
from research import run, writers
from research.errors import UserError
from research.tools import replay

MAIN = "experiments/kvshift/configs/main.py:tiny"
SETTINGS = ["only=kvshift", "seeds=0", "steps=10", "checkpoint.every=4", "checkpoint.keep_last=9", "log_every=1"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp("replay")
  arguments = [f"--config={MAIN}", f"--workdir={path}", *(f"--config.{s}" for s in SETTINGS)]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "argv", ["x", *arguments])
    run.main(build, report)
  return path


def logged(workdir, step):
  return next(r["loss"] for r in writers.read(workdir / "metrics.jsonl") if r["kind"] == "train" and r["step"] == step)


def test_a_step_is_replayed_to_the_bit_from_the_nearest_checkpoint(workdir, command):
  files = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
  status, told, _ = command(replay, f"--workdir={workdir}", "--step=7")
  assert status == 0
  assert "from step 4: 4 logged losses met, 0 differ" in told
  assert f"step 7: loss {logged(workdir, 7)!r}" in told
  assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == files


def test_rows_losses_average_to_that_of_the_step_and_their_documents_are_named(workdir, command):
  _, told, _ = command(replay, f"--workdir={workdir}", "--step=2")
  assert "from step 0: 3 logged losses met, 0 differ" in told
  rows = re.findall(r"^\| (\d+) +\| (\d+\.\d+) +\| (\S+) *\|$", told, re.MULTILINE)
  losses = [float(loss) for _, loss, _ in rows]
  assert sorted(int(i) for i, _, _ in rows) == list(range(8))
  assert losses == sorted(losses, reverse=True)
  assert sum(losses) / 8 == pytest.approx(logged(workdir, 2), abs=1e-4)  # rows are full: all weigh the same
  row, document, text = re.search(r"\nrow (\d+), (\S+): \d+ tokens, loss \S+\n(.*)", told, re.DOTALL).groups()
  assert row == rows[0][0]
  source = pathlib.Path(sysconfig.get_path("stdlib"), document.partition("//")[0])
  assert text.rstrip("\n").removesuffix(" ...") in source.read_text(errors="replace")


def test_a_loss_that_is_not_the_logs_is_told(workdir, command, tmp_path):
  for path in ("manifest.json", "checkpoints"):
    (tmp_path / path).symlink_to(workdir / path)
  lines = writers.read(workdir / "metrics.jsonl")
  changed = [r | {"loss": r["loss"] + 1e-7} if r["step"] == 5 and r["kind"] == "train" else r for r in lines]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in changed))
  status, told, _ = command(replay, f"--workdir={tmp_path}", "--step=5", "--row=3")
  assert status == 1
  assert "2 logged losses met, 1 differ" in told
  assert "\nrow 3, " in told


@pytest.mark.parametrize("argument", ["--step=10", "--step=-1", "--step=1 --row=8"])
def test_a_step_or_row_that_the_run_does_not_have_is_one_line(workdir, command, argument):
  with pytest.raises(UserError, match="has the"):
    command(replay, f"--workdir={workdir}", *argument.split())
