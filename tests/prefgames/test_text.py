"""The pipeline on text: one command from nothing to a tournament, and one update with a learned judge on every mesh."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.prefgames.experiment import build
from research import config, writers
from research.errors import UserError
from research.fit import abstract_state, fresh_state, jit_step
from research.mesh import MeshConfig, to_devices
from research.models.transformer import Transformer
from tests import small

ROOT = pathlib.Path(__file__).parents[2]
TEXT = "experiments/prefgames/configs/text.py"
SMALLER = ["model.layers=1", "model.width=32", "model.heads=2", "model.kv_heads=2", "model.mlp_width=32"]


def single(arm, *overrides):
  """The config of one arm, tiny."""
  return dict(config.expand(config.load(f"{ROOT / TEXT}:tiny", [*SMALLER, *overrides])))[arm]


def test_one_command_goes_from_nothing_to_a_tournament(tmp_path):
  rows = [{"prompt": f"{i}: ", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(60)]
  (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  changes = [*SMALLER, "only=sft,judge,online_ipo_policy,tournament", "steps=2", "tx.warmup=0", "eval_every=0"]
  changes += [f"data.source=files:{tmp_path}/pairs.jsonl", "accumulate=1"]
  command = [sys.executable, "-m", "experiments.prefgames", f"--config={TEXT}:tiny"]
  command += [*(f"--config.{change}" for change in changes), f"--workdir={tmp_path}/run"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  results = json.loads((tmp_path / "run/report/results.json").read_text())
  found = results["results"]
  assert {arm: about["stage"] for arm, about in found["arms"].items()} == {
    "sft": "sft",
    "judge": "judge",
    "online_ipo_policy": "online",
  }
  assert found["arms"]["online_ipo_policy"]["queries"] == 2 * 8
  there, back = found["tournament"]["sft"]["online_ipo_policy"], found["tournament"]["online_ipo_policy"]["sft"]
  assert there["rate"]["0"] + back["rate"]["0"] == pytest.approx(1)
  assert there["error"]["0"] == back["error"]["0"] > 0
  assert found["prompts"] <= 8
  assert (tmp_path / "run/report/text.png").stat().st_size > 10_000
  assert results["data"]["sft"]["rows"]["train"] + results["data"]["sft"]["rows"]["validation"] == 60
  lines = writers.read(tmp_path / "run/metrics.jsonl")
  start, end = (
    next(r["loss"] for r in lines if (r["arm"], r["kind"], r["step"]) == (arm, "eval", 2)) for arm in ("sft", "judge")
  )
  assert np.isfinite([start, end]).all()


def stepped(mesh, devices):
  """(parameters after one update of online IPO with a judge, its metrics)."""
  cfg = dataclasses.replace(single("online_ipo_policy", "tx.warmup=0"), mesh=mesh, accumulate=1)
  with small.use(mesh, devices):
    exp = build(cfg)
    abstract = abstract_state(exp)
    state = fresh_state(exp, abstract, 0)
    reference = jax.tree.map(lambda x: x + 0, state.model)
    judged_by = jax.jit(lambda key: jax.tree.map(lambda x: 2 * x, Transformer(key, cfg.model, mesh.partition)))(
      jax.random.key(7)
    )
    batch = to_devices(next(iter(exp.data("train"))))
    before = small.leaves(state.model)
    state, metrics = jax.block_until_ready(jit_step(exp, cfg, abstract)(state, batch, (reference, judged_by)))
    return before, small.leaves(state.model), {name: float(x) for name, x in metrics.items()}


@pytest.mark.slow
def test_an_update_with_a_judge_is_the_same_on_one_device_and_on_four():
  before, whole, metrics = stepped(MeshConfig(1, 1, 1, "fsdp_tp"), 1)
  _, cut, cut_metrics = stepped(MeshConfig(1, 2, 2, "fsdp_tp"), 4)
  assert max(np.abs(a - b).max() for a, b in zip(whole, before, strict=True)) > 1e-5
  for a, b in zip(cut, whole, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
  assert cut_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
  assert cut_metrics["length"] == metrics["length"]  # what was written is the same


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ("length=40", "length=40: must be data.prompt_tokens [+] data.response_tokens = 32"),
    ("text.online.tokens=7", "text.online.tokens=7: must be data.response_tokens=20"),
    ("data.tokenizer=bpe", "data.tokenizer=bpe: choose bytes or hf"),
    ("text.top_p=0", "top_p=0.0: must lie in"),
  ],
)
def test_settings_that_do_not_fit_are_told_before_any_compile(change, said):
  with pytest.raises(UserError, match=said), small.use():
    build(single("egpo", change))


def test_a_row_without_a_chosen_answer_ends_the_command_before_anything_is_trained(tmp_path):
  rows = [{"prompt": f"{i}: ", "chosen": f"yes {i}", "rejected": "no"} for i in range(9)]
  del rows[4]["chosen"]
  (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  cfg = single("sft", f"data.source=files:{tmp_path}/pairs.jsonl")
  with small.use():
    exp = build(cfg)
  with pytest.raises(UserError, match=r"data.source=.*pairs.jsonl:5 has no chosen answer"):
    exp.info()
