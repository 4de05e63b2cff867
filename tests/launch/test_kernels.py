"""The schedules of the TPU kernels: read from the compiler's dump, and no slower than they were."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import pytest

from launch import kernels, schedule

with_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the compiler for TPUs: pip install -e .[aot]"
)


def run(*arguments, status=0):
  command = [sys.executable, "-m", "launch.kernels", *arguments]
  done = subprocess.run(command, capture_output=True, text=True, timeout=590)
  assert done.returncode == status, done.stderr[-2000:]
  return done


def baseline_or_skip(op="attention"):
  if not kernels.baselines(op):
    pytest.skip(f"no baseline for libtpu {kernels.version()}: python -m launch.kernels --write")


@with_libtpu
def test_a_kernel_is_scheduled_as_its_baseline_says():
  baseline_or_skip()
  rows = json.loads(run("--op=attention", "--case=nano", "--generation=v5e", "--json").stdout)
  ours = {r["kernel"]: r for r in rows if r["program"] == "ours"}
  assert {name.split("_")[2] for name in ours} == {"fwd", "dq", "dkv"}
  # the compiler is deterministic: not 3 % but to the cycle
  assert [r["change"] for r in rows] == [pytest.approx(1, abs=1e-4)] * 6  # baselines are rounded
  for r in rows:
    assert 0 < r["slots"]["MXU"] <= 1
    assert 0 < r["hbm_floor_fraction"] < 1.2
    assert 0 < r["vmem"] < 16 * 2**20
    # batch x heads x blocks of queries x blocks of keys, and two more to fill the pipeline
    assert r["iterations"] == 16 * 4 * (1 if r["program"] == "ours" else 2 * 2) + 2


@pytest.mark.slow
@with_libtpu
@pytest.mark.parametrize("op", kernels.with_kernels())
@pytest.mark.parametrize("generation", kernels.GENERATIONS)
def test_no_kernel_of_any_case_has_become_slower(generation, op):
  baseline_or_skip(op)
  rows = json.loads(run(f"--op={op}", f"--generation={generation}", "--json").stdout)
  assert {r["case"] for r in rows} == set(kernels.with_kernels()[op].CASES)
  assert max(r["change"] for r in rows) <= kernels.TOLERANCE


def test_a_slower_kernel_is_told(monkeypatch):
  found = schedule.Schedule(100, 50, 10, {"MXU": 0.5, "VALU": 0.1, "VLOAD": 0.1, "VSTORE": 0.1}, 0, 0)
  kernel = kernels.Kernel("k", found, 1.0, 0, 1.0)
  before = {"ours": {"k": {"cycles": 480}}}
  assert kernels.row("op", "c", "v5e", "ours", kernel, before)["change"] == pytest.approx(500 / 480)
  assert kernels.TOLERANCE < 500 / 480
  assert kernels.row("op", "c", "v5e", "ours", kernel, {})["change"] is None


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_it_says_what_to_install():
  told = run(status=2).stderr.strip()
  assert told == "error: libtpu=not installed: no TPU compiler here; pip install -e '.[aot]'"


def test_every_op_with_a_tpu_kernel_has_programs():
  """An op whose files call a Pallas TPU kernel is scheduled; nothing has to be registered by hand."""
  ops = pathlib.Path(kernels.ROOT, "research/kernels")
  calls = re.compile(r"pallas(\.ops)?(\.| import )tpu\b")
  with_tpu = {p.parent.name for p in ops.glob("*/*.py") if calls.search(p.read_text())}
  assert with_tpu == set(kernels.with_kernels())


HEAD = "== CAPACTIY:\nMXU, VALU, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL\n4 4 3 3 1 1\n== UTILIZATION:\n"
# prologue; loop { every step: product; first step only: zeros; every step: copy out, skipped when not needed }
BUNDLES = """= control target key end
     0   :  { %1 = vsyncpa [#a], 0 }
   0x1 LB: > { %2 = sphi } /* Start region 3 */
   0x2   : > { %3 = sbr.rel (%p1) target = $region5 }
   0x3   : > { %4 = vst zeros } /* Start region 4 */
   0x4   : > { %5 = vst zeros } /* End region 4 */
   0x5 PF: > { %6 = vmatmul } /* Start/End empty region 5 */
   0x6   : > { %7 = sbr.rel (%p2) target = $region7 }
   0x7   : > { %8 = dma.vmem_to_hbm
note: a line more */ } /* Start region 6 :: End region 6 */
   0x8 PF: > { %p9 = scmp.ge.s32.totalorder %s45, 34 /* loop exit test */ } /* Start region 7 */
   0x9   : > { %10 = sbr.rel (!%p9) target = $region3 }
   0xa   :  { %11 = sfence }
"""
SLOTS = ["0 0 0 0 0 0"] * 3 + ["0 0 0 0 1 0"] * 2 + ["2 1 1 1 0 1"] + ["0 0 0 0 0 0"] * 5


def test_the_steady_body_leaves_out_what_only_first_steps_do():
  found = schedule.parse(BUNDLES, HEAD + "\n".join(SLOTS))
  assert (found.bundles, found.steady, found.iterations) == (11, 7, 34)
  assert found.cycles == 7 * 34
  assert found.slots["MXU"] == 2 / (4 * 7)
  assert found.slots["VSTORE"] == 0  # the zeros are not of every step
  assert (found.fills, found.spills) == (1, 1)


@pytest.mark.parametrize(
  ("bundles", "slots"),
  [
    (BUNDLES, HEAD + "\n".join(SLOTS[1:])),  # one bundle without slots
    (BUNDLES.replace("34 /* loop", "%s7 /* loop"), HEAD + "\n".join(SLOTS)),  # no fixed length
    (BUNDLES.replace("$region3", "$region99"), HEAD + "\n".join(SLOTS)),  # no loop
    (BUNDLES, "== OTHER:\n"),
    ("", HEAD),
  ],
)
def test_another_format_is_told_not_guessed(bundles, slots):
  with pytest.raises(schedule.Unreadable):
    schedule.parse(bundles, slots)
