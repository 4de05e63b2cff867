"""From a command line to trained models: `python -m experiments.NAME --config=FILE.py:ARG --workdir=DIR`.

Exit status: 0 done; 2 a mistake in the command, told in one line; 3 the loss is not
finite; 69 (EX_UNAVAILABLE) another process of the run is gone: start all of them again;
74 (EX_IOERR) a checkpoint could not be written; 75 (EX_TEMPFAIL) interrupted by SIGTERM
or Ctrl-C after saving: run it again. Of several processes all end with the same one.
"""

import argparse
import contextlib
import fcntl
import functools
import math
import os
import pathlib
import shlex
import signal
import sys
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

from research import config, cpu, distributed, manifest, paths, runs, secrets, selfcheck
from research import mesh as meshes
from research.checkpoint import Checkpoints, SaveFailed
from research.errors import UserError, check
from research.fit import Diverged, Experiment, Interrupted, fit
from research.models import convert
from research.writers import Writer

EXIT_USER, EXIT_DIVERGED, EXIT_PEERS, EXIT_SAVE, EXIT_INTERRUPTED = 2, 3, distributed.EXIT_PEERS, 74, 75
_STATUS = {UserError: EXIT_USER, Diverged: EXIT_DIVERGED, SaveFailed: EXIT_SAVE, distributed.PeersMissing: EXIT_PEERS}


def main(build, report=None) -> None:
  """Runs every arm and seed of the config named on the command line, then `report(workdir, cfg)`.

  build: a single run's config -> Experiment. Called for every run, under its mesh,
  before the first of them compiles anything.
  """
  guard(lambda: run(build, report))


def guard(f) -> None:
  """Calls `f()`; mistakes, divergence and interruption end in one line and their exit status."""
  try:
    f()
  except tuple(_STATUS) as e:
    distributed.leave(_STATUS[type(e)], f"error: {e}")
  except Interrupted as e:
    distributed.leave(EXIT_INTERRUPTED, str(e))
  except Exception as e:
    if not distributed.several():
      raise
    distributed.fail(e)
  else:
    distributed.leave(0)


def run(build, report) -> None:
  cpu.tune()  # before anything starts jax's backend
  secrets.refuse(sys.argv[1:])  # the manifest records the command line
  args, overrides = parse_args()
  distributed.start(args)  # first of all, so that the others hear of what is wrong here
  cfg = config.load(args.config, overrides)
  built_by = config.experiment_module(cfg.experiment).build
  check(built_by is build, "experiment", cfg.experiment, f"run it with python -m experiments.{cfg.experiment}")
  check(args.workdir != "", "workdir", "''", "name a directory, or leave --workdir out")
  workdir = paths.parse(args.workdir or default_workdir(cfg.experiment, args.config))
  compilation_cache()
  with double(cfg.x64):
    run_all(build, report, cfg, args.config, overrides, workdir, checked=args.selfcheck)


@contextlib.contextmanager
def double(x64: bool):
  """Float64 for what names no dtype, in every thread: orbax restores in ones that `jax.enable_x64` does not reach."""
  before = jax.config.jax_enable_x64
  jax.config.update("jax_enable_x64", x64)
  try:
    yield
  finally:
    jax.config.update("jax_enable_x64", before)


def run_all(
  build,
  report,
  cfg: config.RunConfig,
  spec: str,
  overrides: list[str],
  workdir: paths.Path,
  checked: bool = False,
) -> None:
  """Every run of `cfg`, which `spec` and `overrides` made, then its report.

  checked: the first seed of every arm goes through `research.selfcheck` before its first step.
  """
  stop = StopSignal()
  singles = config.expand(cfg)
  jobs = []
  for arm, single in singles:
    mesh, exp = prepare(build, single)
    starts = start_points(single, arm, mesh, exp, workdir, [name for name, *_ in cfg.arms])
    jobs.append((arm, single, mesh, exp, starts))
  info = {arm: exp.info() for arm, _, _, exp, _ in jobs}
  same_everywhere(cfg, info)
  with lock(workdir):
    kept = lambda arm, one, *keep: Checkpoints(runs.checkpoint_dir(workdir, arm, one.seed), *keep)
    done = [kept(arm, one).steps()[-1:] == [one.steps] for arm, one in singles]
    manifest.open_workdir(workdir, cfg, spec, overrides, info, trains=not all(done))
    for arm, single, mesh, exp, start in jobs:
      writer = Writer(workdir, arm, single.seed, single.steps)
      keep = (single.checkpoint.keep_last, single.checkpoint.keep_every)
      try:
        with jax.set_mesh(mesh), kept(arm, single, *keep) as checkpoints:
          distributed.on_restart(checkpoints.steps)
          exp.prepare(functools.partial(sibling, workdir, single))
          if checked and single.seed == cfg.seed and not checkpoints.steps():
            selfcheck.selfcheck(build, single, exp, start.get("init_from"), writer.say)
          fit(exp, single, checkpoints, writer, stop, **start)
      finally:
        writer.close()
    if report is not None and jax.process_index() == 0:
      (workdir / "report").mkdir(exist_ok=True)
      report(workdir, cfg)


def sibling(workdir: paths.Path, cfg: config.RunConfig, arm: str) -> paths.Path:
  """Where another arm with the same seed keeps its steps. Raises UserError if it has none."""
  directory = runs.checkpoint_dir(workdir, arm, cfg.seed)
  has_steps = directory.is_dir() and bool(Checkpoints(directory).steps())
  check(has_steps, "arm", arm, f"has no checkpoint in {workdir}; train it first, or in the same command")
  return directory


def parse_args(argv: list[str] | None = None, workdir: bool = True) -> tuple[argparse.Namespace, list[str]]:
  """(--config, --workdir and the flags of `distributed`, overrides "a.b=c") from `argv` (default: the command line).

  Raises UserError on anything else.
  """
  argv = sys.argv[1:] if argv is None else argv
  parser = Parser(description="Any field of the config can be set: --config.tx.lr=3e-4")
  parser.add_argument("--config", required=True, metavar="FILE.py:ARG", help="a config file, e.g. main.py:tiny")
  if workdir:
    parser.add_argument("--workdir", metavar="DIR", help="metrics, checkpoints, report (default: under runs/)")
    told = "before the first step, compare what is fast with what is plain; refuse to start where they differ"
    parser.add_argument("--selfcheck", action="store_true", help=told)
    distributed.add_arguments(parser)
  return parser.parse_with_overrides(argv)


class Parser(argparse.ArgumentParser):
  """For every tool: whatever is wrong with a command line is a UserError, so one line; no abbreviations."""

  def __init__(self, **kwargs):
    super().__init__(allow_abbrev=False, **kwargs)

  def parse_known_args(self, args=None, namespace=None):
    self.given = list(sys.argv[1:] if args is None else args)
    return super().parse_known_args(self.given, namespace)

  def error(self, message):
    raise UserError("command line", shlex.join(self.given) or "(empty)", message)

  def parse_with_overrides(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(arguments, the overrides "a.b=c" given as --config.a.b=c). Raises UserError."""
    overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
    args, rest = self.parse_known_args([a for a in argv if not a.startswith("--config.")])
    if rest:
      raise UserError("command line", rest[0], "unknown argument; settings are given as --config.NAME=VALUE")
    return args, overrides


def default_workdir(experiment: str, spec: str) -> str:
  """runs/<experiment>/<config file>[-<arg>]: the same command finds its own work again."""
  path, _, arg = spec.partition(":")
  name = pathlib.Path(path).stem + (f"-{arg}" if arg else "")
  return os.path.join("runs", experiment, name.replace("=", "-").replace(",", "-"))


def prepare(build, cfg: config.RunConfig):
  """(mesh, experiment) of a single run. Raises UserError for what does not fit, before any compile."""
  try:
    devices = jax.devices()
  except RuntimeError as e:
    raise UserError("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", ""), str(e).split("\n")[0]) from None
  mesh = meshes.make_mesh(cfg.mesh, devices)
  shards = math.prod(mesh.shape[axis] for axis in meshes.BATCH)
  check(
    cfg.batch % (shards * cfg.accumulate) == 0,
    "batch",
    cfg.batch,
    f"must be a multiple of mesh.replica x mesh.data x accumulate = {shards * cfg.accumulate}",
  )
  with jax.set_mesh(mesh):
    exp = build(cfg)
  exp.info()  # reads the data: what is wrong with it is told now
  return mesh, exp


def same_everywhere(cfg: config.RunConfig, info: dict[str, Any]) -> None:
  """Raises UserError where a process has other settings, data or packages than process 0: nothing later would tell."""
  if distributed.several():
    fix = "is not what process 0 has; start all processes with the same"
    distributed.agree("jax", jax.__version__, f"{fix} packages")
    distributed.agree("config", config.digest(config.flat(cfg)), f"{fix} command (this is a hash of the settings)")
    distributed.agree("data", config.digest(info), f"{fix} data and Python (this is the data's hash)")


def start_points(
  cfg: config.RunConfig, arm: str, mesh: jax.sharding.Mesh, exp: Experiment, workdir: paths.Path, arms: list[str]
) -> dict[str, Any]:
  """What `resume` and `init_from` name, as arguments of `fit`.

  Either is the same run in another workdir, or a directory of steps; `init_from` may also
  be published weights (a directory, or a file), of the experiment's very model, or `arm:NAME`, one of the
  command's `arms` before this one. Raises UserError.
  """
  found = {}
  for field in ("resume", "init_from"):
    path = getattr(cfg, field)
    if field == "init_from" and path.startswith("arm:"):
      name, before = path.removeprefix("arm:"), arms[: arms.index(arm)]
      check(name in before, field, path, f"no arm of that name before {arm}; there are {', '.join(before) or 'none'}")
      # its steps may be yet to come
      found[field] = lambda model, name=name: _parameters(Checkpoints(sibling(workdir, cfg, name)), model)
    elif field == "init_from" and path and convert.is_weights(path):
      with jax.set_mesh(mesh):
        model = meshes.shapes_of(exp.init)
        weights = convert.read(path, like=model)
        weights.check_model(model)
      found[field] = weights.fill
    elif path:
      directory = paths.parse(path, field)
      run_dir = runs.checkpoint_dir(directory, arm, cfg.seed)
      found[field] = Checkpoints(run_dir if run_dir.is_dir() else directory)
      fix = f"no checkpoint there; give a workdir with checkpoints/{arm}-{cfg.seed}/, or a directory of steps"
      check(directory.is_dir() and bool(found[field].steps()), field, path, fix)
      if field == "init_from":
        found[field] = functools.partial(_parameters, found[field])
  return found


def _parameters(checkpoints: Checkpoints, model: Any) -> Any:
  return checkpoints.restore({"model": model}, partial=True).state["model"]


def compilation_cache() -> None:
  """Compiled programs are kept (`paths.cache`) for the next run's start."""
  jax.config.update("jax_compilation_cache_dir", str(paths.cache() / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class StopSignal:
  """Notes SIGTERM and Ctrl-C for the loop to act on between steps; a second one acts at once.

  Of several processes any may be told. There SIGTERM is jax's, which agrees with the
  others on the step to stop before; a second Ctrl-C acts at once, a second SIGTERM does not.
  """

  def __init__(self):
    self.asked, self.calls = False, 0
    for number in (signal.SIGINT,) if distributed.several() else (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._note)

  def _note(self, number, frame):
    self.asked = True
    signal.signal(number, signal.SIG_DFL)
    os.write(2, b"\nstopping after this step, to save; once more to stop at once\n")
    if distributed.several():
      os.kill(os.getpid(), signal.SIGTERM)

  def __call__(self, step: int) -> bool:
    """Whether to stop before `step`. All processes get the same answer."""
    if not distributed.several():
      return self.asked
    self.calls += 1  # not the step: that starts anew with every arm, and what jax agrees on would be passed by
    return multihost_utils.reached_preemption_sync_point(self.calls)


class lock:
  """Makes `workdir` and holds it for this run alone, all of its processes. Raises UserError if it cannot be had.

  Nothing locks a bucket: there it only finds out whether it can be written.
  """

  def __init__(self, workdir: paths.Path):
    self.workdir, self.file = workdir, None

  def __enter__(self):
    first = jax.process_index() == 0
    if paths.in_bucket(self.workdir):
      self._write_to_bucket(first)
    else:
      self._hold(first)
    if distributed.several():
      self._check_shared(first)

  def _hold(self, first: bool) -> None:
    try:
      self.workdir.mkdir(parents=True, exist_ok=True)
      self.file = (self.workdir / ".lock").open("w") if first else None
      if first:
        fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError("workdir", self.workdir, "another run is writing there; use another --workdir") from None
    except OSError as e:
      raise UserError("workdir", self.workdir, f"cannot be written: {e.strerror}") from None

  def _write_to_bucket(self, first: bool) -> None:
    try:
      if first:
        (self.workdir / ".lock").write_text(os.urandom(8).hex())
    except Exception as e:  # google's libraries, gcsfs and aiohttp have their own
      raise paths.bad(self.workdir, "workdir", e) from None

  def _check_shared(self, first: bool) -> None:
    if self.file is not None:
      self.file.write(os.urandom(8).hex())
      self.file.flush()
      os.fsync(self.file.fileno())
    token = distributed.share("workdir", (self.workdir / ".lock").read_text() if first else "")
    for _ in range(20):  # network filesystems may take a while to show a file
      try:
        if (self.workdir / ".lock").read_text() == token:
          return
      except OSError:
        pass
      time.sleep(0.5)
    fix = "is not the directory that process 0 has under that name; use one that all processes share"
    raise UserError("workdir", self.workdir, fix)

  def __exit__(self, *exc):
    if self.file is not None:
      self.file.close()
