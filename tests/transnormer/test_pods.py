"""The published sizes find pods, by the real compiler, and nothing in their steps is left uncounted."""

import json

import pytest

from launch import plan
from tests.launch.test_plan import run, with_libtpu

CONFIGS = "experiments/transnormer/configs"


def planned(config, *arguments):
  arguments = [f"--config={CONFIGS}/{config}", "--config.only=transnormer", "--config.seeds=0", "--json", *arguments]
  [found] = json.loads(run(*arguments).stdout)
  return found


@with_libtpu
def test_a_step_on_four_chips_counts_its_kernels():
  found = planned("main.py", "--topology=v5e:2x2", "--config.model.precision=bfloat16")
  assert found["fits"]
  assert not found["counts"]["uncounted"]
  layers = 2
  assert found["counts"]["kernels"] == {f"gated_lightning_attention_{way}": layers for way in ("fwd", "bwd")}
  # no recomputation: the model's own products, and what is quadratic within chunks of 64 beside states of 32 x 32
  assert 1.0 < 4 * found["counts"]["flops"] / found["model_flops"] < 1.3


@pytest.mark.parametrize(("size", "pod"), [("7b", "v5p:8x8x8"), ("65b", "v5p:8x8x8"), ("175b", "v5p:16x16x16")])
def test_the_record_has_a_pod_for_the_largest_sizes(size, pod):
  entries = json.loads((plan.ROOT / "docs/pods.json").read_text())
  name = f"{CONFIGS}/paper.py:{size}"
  [found] = [e for e in entries if (e["config"], e["arm"], e["topology"]) == (name, "transnormer", pod)]
  assert found["fits"]
  assert 0.5 < found["mfu"] < 0.8  # every layer is computed again for the backward pass: at most 3 / 4
  assert not found["counts"]["uncounted"]


@pytest.mark.slow
@with_libtpu
@pytest.mark.parametrize(("size", "least"), [("7b", 4), ("65b", 64), ("175b", 256)])
def test_the_smallest_slice_for_the_largest_sizes_is_found(size, least):
  found = planned(f"paper.py:{size}", "--find=v5p")
  assert found["fits"]
  assert found["chips"] >= least  # 12 bytes a parameter have to lie somewhere
