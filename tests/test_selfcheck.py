"""`--selfcheck` passes what is right and refuses what is not, before the first step. Breakage is made on purpose."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
from jax import numpy as jnp
import pytest

from experiments.kvshift.__main__ import build, report
from research import config, run, selfcheck
from research.errors import UserError
from research.kernels.attention import api
from research.models import transformer

ROOT = pathlib.Path(__file__).parents[1]
MAIN = "experiments/kvshift/configs/main.py:tiny"
SETTINGS = ["only=kvshift", "seeds=0", "steps=3", "mesh.data=2", "mesh.model=2", "batch=8", "eval_every=0"]


def single(*overrides):
  return config.expand(config.load(MAIN, [*SETTINGS, *overrides]))[0][1]


def told(cfg, init_from=None):
  lines = []
  mesh, exp = run.prepare(build, cfg)
  with jax.set_mesh(mesh):
    selfcheck.selfcheck(build, cfg, exp, init_from, lines.append)
  return "\n".join(lines)


def test_a_right_run_is_told_what_was_compared_and_trains(monkeypatch, tmp_path, capfd):
  arguments = [f"--config={MAIN}", f"--workdir={tmp_path}", "--selfcheck", *(f"--config.{s}" for s in SETTINGS)]
  monkeypatch.setattr(sys, "argv", ["x", *arguments])
  run.main(build, report)
  said = capfd.readouterr().err
  for name in ("kernel against its reference", "sharded against one device", "packed against", "decoding against"):
    assert f"selfcheck: {name}" in said
  assert "step 3/3" in said


@pytest.mark.parametrize(
  ("spec", "only", "said"),
  [
    ("cca/configs/toy.py", "", "nothing to compare: kernel against its reference"),
    pytest.param("cca/configs/digits.py", "", "selfcheck: kernel against its reference", marks=pytest.mark.slow),
    pytest.param("cca/configs/digits_var.py", "", "selfcheck: reference against the start", marks=pytest.mark.slow),
    pytest.param("transnormer/configs/main.py", "", "selfcheck: kernel against its reference", marks=pytest.mark.slow),
    pytest.param("prefgames/configs/sequence.py", "", "selfcheck: reference against the start", marks=pytest.mark.slow),
    pytest.param("prefgames/configs/text.py", "sft,judge,egpo", "selfcheck: reference ag", marks=pytest.mark.slow),
  ],
)
def test_every_experiment_is_checked_on_its_own_config(spec, only, said, tmp_path):
  command = [sys.executable, "-m", f"experiments.{spec.split('/')[0]}", f"--config=experiments/{spec}:tiny"]
  command += [f"--workdir={tmp_path}", "--selfcheck", "--config.seeds=0", *([f"--config.only={only}"] if only else [])]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  assert said in done.stderr


def broken_kernel(monkeypatch):
  right = api.IMPLEMENTATIONS["xla"]
  monkeypatch.setitem(api.IMPLEMENTATIONS, "xla", lambda *a, **k: 1.01 * right(*a, **k))


def broken_packing(monkeypatch):
  right = transformer.Transformer.__call__
  blind = lambda self, tokens, segments, positions: right(self, tokens, jnp.ones_like(segments), positions)
  monkeypatch.setattr(transformer.Transformer, "__call__", blind)


def broken_cache(monkeypatch):
  right = transformer.Transformer.extend

  def late(self, tokens, segments, positions, cache):
    return right(self, tokens, segments, positions + 1, cache)

  monkeypatch.setattr(transformer.Transformer, "extend", late)


@pytest.mark.parametrize(
  ("breaks", "name"),
  [
    (broken_kernel, "kernel against its reference"),
    pytest.param(broken_packing, "packed against one document a row", marks=pytest.mark.slow),
    pytest.param(broken_cache, "decoding against the forward pass", marks=pytest.mark.slow),
  ],
)
def test_what_is_broken_is_refused_by_name(monkeypatch, breaks, name):
  breaks(monkeypatch)
  with pytest.raises(UserError, match=name):
    told(single())


@pytest.mark.slow
def test_a_loss_that_depends_on_the_mesh_is_refused(monkeypatch):
  right = transformer.Transformer.__call__

  def wrong(self, *args):
    return right(self, *args) * (1 + 0.01 * (jax.sharding.get_abstract_mesh().size > 1))

  monkeypatch.setattr(transformer.Transformer, "__call__", wrong)
  with pytest.raises(UserError, match="sharded against one device"):
    told(single())


def test_a_reference_that_is_not_the_start_is_refused():
  cfg = single("mesh.data=4", "mesh.model=1")
  mesh, exp = run.prepare(build, cfg)
  loss = exp.loss
  exp = dataclasses.replace(exp, reference=True, loss=lambda model, batch, key, reference: loss(model, batch, key))
  read = iter((0.01, 0.02))

  def init_from(model):  # weights that change between the two times they are read
    value = next(read)
    return jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype, device=x.sharding), model)

  with jax.set_mesh(mesh), pytest.raises(UserError, match="reference against the start"):
    selfcheck.selfcheck(build, cfg, exp, init_from, lambda line: None)
