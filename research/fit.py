"""An experiment's parts, the default update, and the loop every run goes through."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
import time
from typing import Any

import jax
from jax import P
from jax import numpy as jnp
import optax

from research import optim
from research.checkpoint import Checkpoints
from research.config import RunConfig
from research.errors import check
from research.hardware import peak_flops
from research.mesh import on_devices, row_spec, shapes_of, to_devices
from research.metrics import Mean, add
from research.writers import Writer

Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a paper hands to the library.

  init: key -> model, an nnx module in tree mode, made under the current mesh.
  loss: (model, batch, key) -> {"loss": Mean, ...}. "loss" is what is minimised; sums
    and weights, not means, so that micro-batches, shards and batches add up exactly.
  reference: the loss gets the model that the run started from as a fourth argument: `init_from`'s, or the fresh one.
    No step changes it, no checkpoint holds it, and a resumed run makes it again.
  companion: () -> further arrays that no step changes, such as a learned judge. Loss and step then get
    (reference or None, companion) as that argument. Called after `prepare`; traceable, as a plan needs its shapes.
  data: "train" or "validation" -> a grain.IterDataset of this process's rows, as dicts of numpy arrays.
  evals: further (model) -> {name: number}, run with the validation loss.
  flops_per_token: model FLOPs a token of one training step, by part, for utilisation.
  info: () -> what the manifest says of the data. The first call reads the data and
    raises UserError for what is wrong with it; building an experiment reads nothing.
  batch: () -> shapes and dtypes of a whole batch of all processes, to compile without data; reads nothing.
  check_start: called with the model and the reference (None without one) before the first step of a run that resumes
    nothing; raises UserError where a run must not begin.
  prepare: called once before the run's first step, with a function from the name of an earlier arm of the
    command to its directory of checkpoints (of the same seed): for data that another model makes.
  train_step: another update than `default_train_step`, with its arguments and results.
  """

  init: Callable[[jax.Array], Any]
  loss: Callable[..., dict[str, Mean]]
  data: Callable[[str], Any]
  tx: optax.GradientTransformation
  evals: Mapping[str, Callable[[Any], dict[str, float]]] = dataclasses.field(default_factory=dict)
  flops_per_token: Mapping[str, float] = dataclasses.field(default_factory=dict)
  info: Callable[[], dict[str, Any]] = dict
  batch: Callable[[], dict[str, jax.ShapeDtypeStruct]] = dict
  reference: bool = False
  companion: Callable[[], Any] | None = None
  check_start: Callable[[Any, Any], None] = lambda model, reference: None
  prepare: Callable[[Callable[[str], Any]], None] = lambda sibling: None
  train_step: Callable[..., Any] | None = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["step", "model", "opt", "key"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a step changes. With the data iterator's state, all that a checkpoint holds."""

  step: jax.Array  # int32 scalar, updates made so far
  model: Any
  opt: Any
  key: jax.Array  # the run's key; step t uses fold_in(key, t)


class Diverged(Exception):
  """The loss or the gradients stopped being finite."""

  def __init__(self, step: int, kept: int | None):
    self.step, self.kept = step, kept
    last = "no checkpoint was saved before it" if kept is None else f"the last good checkpoint is step {kept}"
    super().__init__(
      f"loss, gradients or update are not finite at step {step}; {last}; lower tx.lr or allow skip_nonfinite"
    )


class Interrupted(Exception):
  """The run was asked to stop, and has saved its state."""

  def __init__(self, step: int):
    self.step = step
    super().__init__(f"interrupted; saved at step {step}; run the same command again to go on")


def init_state(exp: Experiment, key: jax.Array) -> TrainState:
  """The state before the first step; traceable."""
  model_key, run_key = jax.random.split(key)
  model = exp.init(model_key)
  return TrainState(jnp.zeros((), jnp.int32), model, exp.tx.init(model), run_key)


def abstract_state(exp: Experiment) -> TrainState:
  """`init_state` as ShapeDtypeStructs with NamedShardings on the current mesh; nothing is allocated."""
  state = shapes_of(functools.partial(init_state, exp))
  mesh = jax.sharding.get_abstract_mesh()
  stands = dict(jax.tree_util.tree_leaves_with_path(state.model))

  def place(path, x):
    # optax makes its moments with zeros_like, which forgets where the parameter stands; the
    # path of a moment ends in its parameter's.
    like = next((stands[path[i:]] for i in range(len(path)) if path[i:] in stands), None)
    spec = like.sharding.spec if like is not None and like.shape == x.shape else P()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

  return jax.tree_util.tree_map_with_path(place, state)


def fresh_state(exp: Experiment, abstract: TrainState, seed: int) -> TrainState:
  """`init_state` for real, where `abstract` says; without a model where `abstract` has none."""

  def init(key):
    state = init_state(exp, key)
    return dataclasses.replace(state, model=None) if abstract.model is None else state

  made = jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))(jax.random.key(seed))
  return jax.block_until_ready(made)


def abstract_batch(exp: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
  """A batch as it stands on the current mesh; nothing is read or allocated."""
  mesh = jax.sharding.get_abstract_mesh()
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, row_spec(x.ndim)))
  return {name: place(x) for name, x in exp.batch().items()}


def jit_step(exp: Experiment, cfg: RunConfig, state: TrainState):
  """(state, batch, reference or None) -> (state, metrics) as it is compiled: the old state is given up for the new.

  state: any that has shapes and shardings, as from `abstract_state`.
  """
  shardings = jax.tree.map(lambda x: x.sharding, state)
  step = functools.partial(exp.train_step or default_train_step, exp, cfg)
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def default_train_step(exp: Experiment, cfg: RunConfig, state: TrainState, batch: Batch, reference: Any = None):
  """One update from one batch, in `cfg.accumulate` micro-batches. Returns (state, metrics).

  Gradients are those of sum(total) / sum(weight) over the whole batch: the same
  for every accumulation and every mesh.
  """
  key = jax.random.fold_in(state.key, state.step)
  loss = lambda model, batch, key: exp.loss(model, batch, key, *if_any(reference))
  grads, means = accumulated(loss, state.model, batch, key, cfg.accumulate)
  updates, opt = exp.tx.update(grads, state.opt, state.model)
  new = TrainState(state.step + 1, optax.apply_updates(state.model, updates), opt, state.key)
  metrics = {name: mean.value for name, mean in means.items()}
  metrics |= {"grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
  return unless_nonfinite(cfg, state, new, metrics), metrics


def accumulated(loss: Callable[..., dict[str, Mean]], model: Any, batch: Any, key: jax.Array, micro_batches: int):
  """(gradients of sum(total) / sum(weight), sums) of a loss (model, batch, key), in so many micro-batches.

  batch: a tree of arrays [batch, ...], all of them cut along the batch axes.
  """

  def objective(model, batch, key):
    means = loss(model, batch, key)
    return means["loss"].total, means

  grad = jax.grad(objective, has_aux=True)
  if micro_batches == 1:
    grads, means = grad(model, batch, key)
  else:
    micro = jax.tree.map(functools.partial(_micro_batches, n=micro_batches), batch)
    keys = jax.random.split(key, micro_batches)
    shapes = jax.eval_shape(grad, model, *jax.tree.map(lambda x: x[0], (micro, keys)))
    # a constant, such as a number of rows, stands nowhere
    spec = lambda x: P() if x.sharding is None else x.sharding.spec
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=spec(x)), shapes)
    body = lambda sums, xs: (jax.tree.map(jnp.add, sums, grad(model, *xs)), None)
    (grads, means), _ = jax.lax.scan(body, zeros, (micro, keys))
  weight = jnp.maximum(means["loss"].weight, 1e-9)
  return jax.tree.map(lambda g: g / weight, grads), means


def unless_nonfinite(cfg: RunConfig, state: TrainState, new: TrainState, metrics: Mapping[str, jax.Array]):
  """`new`; where `cfg.skip_nonfinite` allows it and a metric of the step is not finite, `state`, a step later."""
  if not cfg.skip_nonfinite:
    return new
  ok = jnp.isfinite(metrics["loss"] + metrics["grad_norm"] + metrics["update_norm"])
  skipped = dataclasses.replace(state, step=new.step)
  # keys cannot be selected, and need not be: they never change
  return jax.tree.map(lambda a, b: a if a is b else jnp.where(ok, a, b), new, skipped)


def abstract_reference(exp: Experiment, state: TrainState) -> Any:
  """What `jit_step` takes beside a state and a batch, as abstract arrays on the current mesh; None: nothing."""
  reference = state.model if exp.reference else None
  return reference if exp.companion is None else (reference, on_devices(jax.eval_shape(exp.companion)))


def frozen(exp: Experiment, cfg: RunConfig, abstract: TrainState, init_from: Callable[[Any], Any] | None) -> Any:
  """What `jit_step` takes beside a state and a batch: the reference, the companion, both, or None."""
  reference = start_model(exp, cfg, on_devices(abstract), init_from) if exp.reference else None
  return reference if exp.companion is None else (reference, jax.block_until_ready(exp.companion()))


def if_any(reference: Any) -> tuple:
  """The further arguments of a loss."""
  return () if reference is None else (reference,)


def fit(
  exp: Experiment,
  cfg: RunConfig,
  checkpoints: Checkpoints,
  writer: Writer,
  should_stop: Callable[[int], bool] = lambda step: False,
  *,
  resume: Checkpoints | None = None,
  init_from: Callable[[Any], Any] | None = None,
) -> TrainState:
  """Trains to `cfg.steps` under the current mesh and returns the last state.

  Starts from the newest of: `checkpoints` (its own), `resume` (another run's state and
  place in the data), a fresh state whose parameters are `init_from(abstract model)` where that is given.

  The order of things inside a step is part of the contract: evaluation, then
  saving, see the state before step t; the iterator is saved before it moves; the
  metrics of step t are read while step t+1 runs, but always before a save, so that
  no checkpoint holds a state that a non-finite step has spoilt.

  Raises Diverged, and Interrupted when `should_stop(step)` said so.
  """
  abstract = abstract_state(exp)
  data = iter(exp.data("train"))
  state, start = _restore(exp, cfg, abstract, data, checkpoints, resume, init_from)
  if start >= cfg.steps and start in checkpoints.steps():
    writer.say(f"complete at step {start}")
    return state
  check(start < cfg.steps, "resume", f"step {start}", f"that run is as long as this one: steps={cfg.steps}; set more")
  if start:
    writer.say(f"going on from step {start}")
  writer.start(start)
  reference = frozen(exp, cfg, abstract, init_from)
  if not start:
    exp.check_start(state.model, reference)
  step_fn = jit_step(exp, cfg, abstract)
  log = _Log(cfg, exp, writer, checkpoints)
  evaluate = Evaluator(exp, cfg, reference)
  step = start
  while True:
    last = step == cfg.steps
    if last or (cfg.eval_every and step % cfg.eval_every == 0):
      log.flush()
      writer.write("eval", step, evaluate(state.model))
      log.restart_clock()
    if step > start and (last or (cfg.checkpoint.every and step % cfg.checkpoint.every == 0)):
      log.flush()
      _save(checkpoints, step, state, data, cfg, writer)
    if last:
      break
    if should_stop(step):
      log.flush()
      checkpoints.wait()
      if step not in checkpoints.steps():
        _save(checkpoints, step, state, data, cfg, writer)
        checkpoints.wait()
      raise Interrupted(step)
    batch = to_devices(next(data))
    state, metrics = step_fn(state, batch, reference)
    log.push(step, metrics)
    step += 1
  checkpoints.wait()
  return state


class Evaluator:
  """The validation loss and the experiment's own evaluations, compiled once."""

  def __init__(self, exp: Experiment, cfg: RunConfig, reference: Any = None):
    self.exp, self.batches, self.reference = exp, cfg.eval_batches, reference
    self.means = jax.jit(lambda model, batch, *rest: exp.loss(model, batch, jax.random.key(0), *rest))

  def __call__(self, model) -> dict[str, float]:
    """{"loss": validation loss, ...}: exact means over the split (or its first `eval_batches`)."""
    total = None
    for i, batch in enumerate(self.exp.data("validation")):
      if self.batches and i == self.batches:
        break
      means = jax.block_until_ready(self.means(model, to_devices(batch), *if_any(self.reference)))
      total = means if total is None else add(total, means)
    values = {name: float(mean.value) for name, mean in total.items()}
    for name, f in self.exp.evals.items():
      values |= {f"{name}/{k}" if k else name: float(v) for k, v in f(model).items()}
    return values


def _restore(exp, cfg, abstract, data, checkpoints, resume, init_from) -> tuple[TrainState, int]:
  abstract = on_devices(abstract)
  # Damaged steps of its own directory are set aside, so that they can be saved again.
  restored = checkpoints.restore(abstract, quarantine=True)
  if restored is None and resume is not None:
    restored = resume.restore(abstract)
    seed = restored.metadata["seed"]
    check(seed == cfg.seed, "resume", resume.directory, f"holds seed {seed}, and this run has seed {cfg.seed}")
  if restored is not None:
    data.set_state(restored.data_state)
    return restored.state, restored.step
  return start_state(exp, cfg, abstract, init_from), 0


def start_model(exp: Experiment, cfg: RunConfig, abstract: TrainState, init_from) -> Any:
  """The model of `start_state`, without the rest."""
  return fresh_state(exp, abstract, cfg.seed).model if init_from is None else init_from(abstract.model)


def start_state(exp: Experiment, cfg: RunConfig, abstract: TrainState, init_from) -> TrainState:
  """The state before the first step of a run that resumes nothing."""
  if init_from is None:
    return fresh_state(exp, abstract, cfg.seed)
  # not two models at a time, nor the time to make the one that is not kept
  state = fresh_state(exp, dataclasses.replace(abstract, model=None), cfg.seed)
  return dataclasses.replace(state, model=start_model(exp, cfg, abstract, init_from))


def _save(checkpoints, step, state, data, cfg, writer) -> None:
  writer.flush()  # what is logged before a checkpoint must outlive it
  checkpoints.save(step, state, data.get_state(), {"seed": cfg.seed, "steps": cfg.steps})


def _micro_batches(x: jax.Array, n: int) -> jax.Array:
  """[batch, ...] -> [n, batch / n, ...]; micro-batch i takes rows i, i+n, ... so that no row changes device."""
  spec = jax.typeof(x).sharding.spec
  rows = jax.lax.reshape(x, (x.shape[0] // n, n, *x.shape[1:]), out_sharding=P(spec[0], None, *spec[1:]))
  return jnp.moveaxis(rows, 1, 0)


class _Log:
  """Reads a step's metrics one step late, watches for non-finite ones, and writes every `log_every`-th."""

  def __init__(self, cfg: RunConfig, exp: Experiment, writer: Writer, checkpoints: Checkpoints):
    self.cfg, self.exp, self.writer, self.checkpoints = cfg, exp, writer, checkpoints
    self.schedule = optim.schedule(cfg.tx, cfg.steps)
    self.peak = peak_flops()
    self.pending = None
    self.bad = 0
    self.restart_clock()
    # Virtual CPU devices deadlock when steps queue up on few cores.
    self.block = jax.default_backend() == "cpu"

  def restart_clock(self):
    self.clock, self.timed = time.perf_counter(), 0

  def push(self, step: int, metrics) -> None:
    self.flush()
    self.pending = (step, metrics)
    if self.block:
      jax.block_until_ready(metrics)

  def flush(self) -> None:
    if self.pending is None:
      return
    (step, metrics), self.pending = self.pending, None
    metrics = {name: float(x) for name, x in metrics.items()}
    self.timed += 1
    finite = all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm", "update_norm"))
    self.bad = 0 if finite else self.bad + 1
    if finite and step % self.cfg.log_every and step + 1 != self.cfg.steps:
      return
    now = time.perf_counter()
    seconds = (now - self.clock) / self.timed
    self.clock, self.timed = now, 0
    metrics |= {"lr": float(self.schedule(step)), "step_seconds": seconds}
    metrics["tokens_per_second"] = self.cfg.batch * self.cfg.length / seconds
    if self.peak and self.exp.flops_per_token:
      metrics["mfu"] = sum(self.exp.flops_per_token.values()) * metrics["tokens_per_second"] / self.peak
    self.writer.write("train", step, metrics)
    if self.bad > self.cfg.skip_nonfinite:
      self.checkpoints.wait()
      self.writer.flush()
      if step in self.checkpoints.steps():  # its loss is not finite: not a state to go on from
        self.checkpoints.set_aside(step)
      raise Diverged(step, max(self.checkpoints.steps(), default=None))
