"""The loop and the default step, on a least-squares problem small enough to compute by hand."""

import contextlib
import dataclasses
import json
import math

from flax import nnx
import jax
from jax import P
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from research import data, writers
from research.checkpoint import Checkpoints
from research.config import CheckpointConfig, RunConfig
from research.errors import UserError
from research.fit import Diverged, Experiment, Interrupted, default_train_step, fit, init_state
from research.mesh import MeshConfig, to_devices
from research.metrics import Mean
from research.optim import OptimizerConfig
from tests import small

WIDTH, RATE = 4, 0.1
RNG = np.random.default_rng(0)
TRUTH = RNG.normal(size=WIDTH)


class Rows:
  """y = x . TRUTH, with a weight a row; rows named in `bad` hold NaN."""

  def __init__(self, n=64, bad=()):
    rng = np.random.default_rng(1)
    self.x = rng.normal(size=(n, WIDTH)).astype(np.float32)
    self.weights = rng.integers(1, 4, size=n).astype(np.float32)
    self.y = (self.x @ TRUTH).astype(np.float32)
    self.y[list(bad)] = np.nan

  def __len__(self):
    return len(self.x)

  def __getitem__(self, i):
    return {"x": self.x[i], "y": self.y[i], "weights": self.weights[i]}

  def __repr__(self):
    return "Rows"


class Linear(nnx.Module):
  def __init__(self, key):
    self.w = nnx.Param(jax.random.normal(key, (WIDTH,), out_sharding=P(None)))


def squared_error(model, batch, key):
  del key
  error = batch["x"] @ model.w[...] - batch["y"]
  return {"loss": Mean(jnp.sum(batch["weights"] * error**2), jnp.sum(batch["weights"]))}


def experiment(rows=None, loss=squared_error, **parts):
  source = Rows() if rows is None else rows
  return Experiment(
    init=Linear,
    loss=loss,
    data=lambda split: data.batches(source, 8, seed=0, train=split == "train"),
    tx=optax.sgd(RATE),
    **parts,
  )


def settings(**changes):
  every = {"steps": 12, "batch": 8, "length": 2, "log_every": 1, "eval_every": 5, "tx": OptimizerConfig(warmup=0)}
  every["checkpoint"] = CheckpointConfig(every=4, keep_last=9)
  return RunConfig("none", **every | changes)


def train(workdir, cfg, exp=None, should_stop=lambda step: False, devices=1, **start):
  """Runs the loop in `workdir`; returns the last state and what was logged."""
  writer = writers.Writer(workdir, "main", 0, cfg.steps)
  with small.use(MeshConfig(1, devices, 1), devices), Checkpoints(workdir / "checkpoints", 9) as checkpoints:
    try:
      state = fit(exp or experiment(), cfg, checkpoints, writer, should_stop, **start)
    finally:
      writer.close()
  return state, writers.read(workdir / "metrics.jsonl")


def by_hand(w, rows):
  """The weighted mean squared error of rows and its gradient, in float64."""
  x, y, weights = (np.stack([r[k] for r in rows]).astype(np.float64) for k in ("x", "y", "weights"))
  error = x @ w - y
  return np.sum(weights * error**2) / weights.sum(), 2 * (weights * error) @ x / weights.sum()


def test_every_logged_loss_is_that_of_the_state_before_the_step(tmp_path):
  _, records = train(tmp_path, settings())
  exp, rows = experiment(), Rows()
  with small.use():
    w = np.asarray(init_state(exp, jax.random.key(0)).model.w[...], np.float64)
  batches = iter(exp.data("train"))
  for step in range(12):
    batch = next(batches)
    loss, gradient = by_hand(w, [dict(zip(batch, r, strict=True)) for r in zip(*batch.values(), strict=True)])
    logged = {r["kind"]: r for r in records if r["step"] == step}
    assert logged["train"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["train"]["grad_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-4)
    assert logged["train"]["update_norm"] == pytest.approx(RATE * np.linalg.norm(gradient), rel=1e-4)
    if step % 5 == 0:
      everything, _ = by_hand(w, [rows[i] for i in range(64)])
      assert logged["eval"]["loss"] == pytest.approx(everything, rel=1e-5)
    w = w - RATE * gradient
  assert records[-1]["kind"] == "eval"
  assert records[-1]["step"] == 12


@pytest.mark.parametrize(("accumulate", "devices"), [(2, 1), (4, 1), (8, 1), (2, 4)])
def test_accumulation_and_devices_change_nothing_though_micro_batches_weigh_differently(accumulate, devices):
  exp = experiment()
  results = []
  for n, count in ((1, 1), (accumulate, devices)):
    with small.use(MeshConfig(1, count, 1), count):
      batch = to_devices(next(iter(exp.data("train"))))
      step = jax.jit(lambda s, b, n=n: default_train_step(exp, settings(accumulate=n), s, b))
      state, metrics = step(init_state(exp, jax.random.key(0)), batch)
      results.append((np.asarray(state.model.w[...]), float(metrics["loss"]), float(metrics["grad_norm"])))
  for a, b in zip(*results, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_step_gives_its_buffers_back():
  seen = []

  def loss(model, batch, key):
    seen.append(model)
    return squared_error(model, batch, key)

  exp = experiment(loss=loss)
  with small.use():
    state = init_state(exp, jax.random.key(0))
    batch = to_devices(next(iter(exp.data("train"))))
    step = jax.jit(lambda s, b: default_train_step(exp, settings(), s, b), donate_argnums=0)
    new, _ = step(state, batch)
    assert state.model.w[...].is_deleted()
    assert not new.model.w[...].is_deleted()


def bad_at(step):
  """Rows such that the batch of exactly this training step holds a NaN."""
  batches = iter(experiment().data("train"))
  wanted = [next(batches) for _ in range(step + 1)][-1]["x"][0]
  row = int(np.flatnonzero((Rows().x == wanted).all(axis=1))[0])
  return Rows(bad=[row]), row


def test_a_non_finite_loss_stops_at_its_step_and_nothing_it_spoilt_is_saved(tmp_path):
  rows, _ = bad_at(6)
  # evaluation would meet the bad row first: keep it out
  with pytest.raises(Diverged) as raised:
    train(tmp_path, settings(eval_every=0), experiment(rows))
  assert raised.value.step == 6
  assert raised.value.kept == 4
  records = writers.read(tmp_path / "metrics.jsonl")
  assert records[-1]["step"] == 6
  assert records[-1]["loss"] is None  # JSON has no NaN
  assert all(math.isfinite(r["loss"]) for r in records[:-1])
  content = json.loads((tmp_path / "checkpoints" / "4" / "record" / "data.json").read_text())["content"]
  assert content["step"] == 4


def test_a_policy_may_skip_a_non_finite_step_and_the_state_stays_as_it_was(tmp_path):
  rows, _ = bad_at(6)
  exp = experiment(rows)
  cfg = settings(skip_nonfinite=1, steps=8, eval_every=0, eval_batches=1)
  clean = lambda split: (exp if split == "train" else experiment()).data(split)
  state, records = train(tmp_path, cfg, dataclasses.replace(exp, data=clean))
  w = [r for r in records if r["kind"] == "train"]
  assert w[6]["loss"] is None
  assert math.isfinite(w[7]["loss"])
  assert np.isfinite(state.model.w[...]).all()
  assert int(state.step) == 8


def test_skipping_ends_when_too_many_steps_in_a_row_are_bad(tmp_path):
  always = lambda model, batch, key: {"loss": Mean(jnp.nan * jnp.sum(model.w[...]), jnp.float32(1))}
  with pytest.raises(Diverged) as raised:
    train(tmp_path, settings(skip_nonfinite=3, eval_every=0), experiment(loss=always))
  assert raised.value.step == 3


def test_asked_to_stop_it_saves_first_and_goes_on_the_same(tmp_path):
  for name in ("whole", "cut"):
    (tmp_path / name).mkdir()
  whole, records = train(tmp_path / "whole", settings())
  for stop in (0, 3, 4, 9):  # before anything, between saves, on a save
    with pytest.raises(Interrupted) as raised:
      train(tmp_path / "cut", settings(), should_stop=lambda step, stop=stop: step == stop)
    assert raised.value.step == stop
  state, cut = train(tmp_path / "cut", settings())
  assert (np.asarray(state.model.w[...]) == np.asarray(whole.model.w[...])).all()
  untimed = lambda rs: [{k: v for k, v in r.items() if k not in ("step_seconds", "tokens_per_second")} for r in rs]
  assert untimed(cut) == untimed(records)


def test_a_paper_can_bring_its_own_step(tmp_path):
  def backwards(exp, cfg, state, batch, reference):
    new, metrics = default_train_step(exp, cfg, state, batch)
    return dataclasses.replace(new, model=state.model), metrics

  writer = writers.Writer(tmp_path, "main", 0, 3)
  with small.use(), Checkpoints(tmp_path / "checkpoints") as checkpoints:
    state = fit(experiment(train_step=backwards), settings(steps=3), checkpoints, writer)
    writer.close()
    start = init_state(experiment(), jax.random.key(0))
    assert (np.asarray(state.model.w[...]) == np.asarray(start.model.w[...])).all()


def away_from_reference(model, batch, key, reference):
  means = squared_error(model, batch, key)
  apart = jnp.sum((model.w[...] - reference.w[...]) ** 2)
  return means | {"apart": Mean(apart, jnp.ones(()))}


def test_a_start_is_checked_with_its_reference_before_the_first_step_and_not_where_a_run_goes_on(tmp_path):
  checked = []

  def check_start(model, reference):
    np.testing.assert_array_equal(model.w[...], reference.w[...])
    checked.append(reference)
    if len(checked) == 2:
      raise UserError("start", "other", "refused")

  exp = experiment(loss=away_from_reference, reference=True, check_start=check_start)
  train(tmp_path, settings(steps=4), exp)
  train(tmp_path, settings(steps=8), exp)
  assert len(checked) == 1
  (tmp_path / "new").mkdir()
  with pytest.raises(UserError, match="start=other"):
    train(tmp_path / "new", settings(steps=4), exp)
  assert not Checkpoints(tmp_path / "new" / "checkpoints", 9).steps()


@pytest.mark.parametrize("start", [None, 7.0])
def test_the_reference_is_where_the_run_started_and_stays_there_through_a_restart(tmp_path, start):
  fill = start and (lambda abstract: jax.tree.map(lambda x: jnp.full(x.shape, start, x.dtype), abstract))
  exp = experiment(loss=away_from_reference, reference=True)
  seen = {}
  for name, stop in (("whole", None), ("cut", 5)):
    (tmp_path / name).mkdir()
    for last in (stop, None):
      with contextlib.suppress(Interrupted):
        _, seen[name] = train(tmp_path / name, settings(), exp, lambda t, last=last: t == last, init_from=fill)
  apart = lambda name: [r["apart"] for r in seen[name] if r["kind"] == "eval"]
  assert apart("whole")[0] == 0.0
  assert min(apart("whole")[1:]) > 0.0
  assert apart("cut") == apart("whole")
  if start is not None:
    first = next(r["loss"] for r in seen["whole"] if r["kind"] == "eval")
    rows = Rows()
    assert first == pytest.approx(np.average((rows.x @ np.full(WIDTH, start) - rows.y) ** 2, weights=rows.weights))


def test_a_half_written_last_line_is_dropped_and_a_damaged_middle_is_not(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 0}\n{"step": 1}\n{"ste')
  assert [r["step"] for r in writers.read(path)] == [0, 1]
  path.write_text('{"step": 0}\n{"ste\n{"step": 2}\n')
  with pytest.raises(UserError, match="line 2 is damaged"):
    writers.read(path)
