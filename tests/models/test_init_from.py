"""A run starts from published weights with their loss, or is told in a table that they are of another model."""

import sys

import jax
import numpy as np
import pytest

from experiments.kvshift.attention import KVShift
from research import config, run, writers
from research.models import convert
from research.models.transformer import Transformer
from research.tools import logits
from tests import small
from tests.models.weights import load, row

CONFIG = "experiments/kvshift/configs/induction.py:tiny"
RUN = [f"--config={CONFIG}", "--config.only=kvshift-1", "--config.seeds=0", "--config.steps=3"]


def start(monkeypatch, workdir, weights, *more):
  module = __import__("experiments.kvshift.__main__", fromlist=["build"])
  arguments = [*RUN, f"--workdir={workdir}", f"--config.init_from={weights}", *more]
  monkeypatch.setattr(sys, "argv", ["x", *arguments])
  run.main(module.build)


@pytest.fixture
def weights(tmp_path):
  """Exported random weights that the run above can start from, and its config."""
  cfg = dict(config.expand(config.load(CONFIG, [a.removeprefix("--config.") for a in RUN[1:]])))["kvshift-1"]
  with small.use():
    model = Transformer(jax.random.key(11), cfg.model, mix=KVShift)
    convert.export(model, tmp_path / "weights")
  return cfg, tmp_path / "weights"


def test_a_run_starts_from_weights_with_their_loss(weights, tmp_path, monkeypatch):
  cfg, path = weights
  start(monkeypatch, tmp_path / "run", path)
  first = next(r for r in writers.read(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "eval")
  mesh, exp = run.prepare(config.experiment_module("kvshift").build, cfg)
  with jax.set_mesh(mesh):
    batches = [b for _, b in zip(range(cfg.eval_batches or 10**9), exp.data("validation"), strict=False)]
  with small.use():
    _, model = load(path)
    out = [logits.logits(model, cfg.model.vocab, b["tokens"]) for b in batches]
  assert all((b["segment_ids"][b["weights"] > 0] == 1).all() for b in batches)  # one document a row, as the tool has it
  likelihood = lambda y, t: np.take_along_axis(np.asarray(jax.nn.log_softmax(y)), t[..., None], -1)[..., 0]
  total = sum((b["weights"] * likelihood(y, b["targets"])).sum() for y, b in zip(out, batches, strict=True))
  assert first["step"] == 0
  np.testing.assert_allclose(first["loss"], -total / sum(b["weights"].sum() for b in batches), rtol=1e-5)


def test_weights_of_another_model_are_told_in_a_table_before_anything_runs(weights, tmp_path, monkeypatch, capsys):
  _, path = weights

  def stops(*more):
    with pytest.raises(SystemExit) as e:
      start(monkeypatch, tmp_path / "run", path, *more)
    assert e.value.code == run.EXIT_USER
    assert not (tmp_path / "run").exists()
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith(f"error: weights={path}: are of another model than this run's")
    return told

  told = stops("--config.model.mlp_width=32", "--config.model.rope_base=500")
  assert row(told, "model.mlp_width")[1] == "32"
  assert row(told, "model.rope_base") == ["100000.0", "500.0"]
  assert len(told) == 6
  told = stops("--config.only=plain-1")
  assert row(told, "blocks.attention.mix.key")[1] == "absent"
  assert len(told) == 6
