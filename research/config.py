"""Configs: a locked ConfigDict while it is edited, a frozen dataclass once it runs.

A config file defines `get_config(arg)` and returns a ConfigDict made by
`defaults(Config)`, where `Config` is the dataclass of its experiment. The
dataclass's annotations are the one source of types: they parse `--config.a.b=c`,
check what the file wrote, and name the choices in every message.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import json
import math
import pathlib
import types
import typing
from typing import Any, Literal

from ml_collections import ConfigDict

from research.errors import UserError, check, one_line
from research.mesh import MeshConfig
from research.optim import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save, in steps, and what to keep. `every=0` saves only the last step."""

  every: int = 0
  keep_last: int = 2
  keep_every: int = 0  # steps divisible by this are never removed; 0: none

  def __post_init__(self):
    check(self.every >= 0, "every", self.every, "use 0 (only the last step) or a number of steps")
    check(self.keep_last >= 1, "keep_last", self.keep_last, "keep at least one checkpoint")
    check(self.keep_every >= 0, "keep_every", self.keep_every, "use 0 (none) or a number of steps")


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """What every experiment's `Config` has; an experiment adds `model`, `data` and its own knobs.

  One command runs `arms` x `seeds`. An arm is its name and the overrides that make it
  differ, ("small", "model.layers=1"); without any there is one, "main".
  """

  experiment: str  # the package under experiments/ that builds this config
  steps: int = 1000
  batch: int = 32  # rows a step, over all devices and micro-batches
  length: int = 256  # tokens a row
  accumulate: int = 1  # micro-batches a step
  seeds: tuple[int, ...] = (0,)
  arms: tuple[tuple[str, ...], ...] = ()
  only: tuple[str, ...] = ()  # run these arms; (): all
  mesh: MeshConfig = MeshConfig()
  tx: OptimizerConfig = OptimizerConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  log_every: int = 10
  eval_every: int = 100  # also evaluated at the first and the last step; 0: at the last only
  eval_batches: int = 0  # 0: the whole validation split
  x64: bool = False  # float64 for what names no dtype, for numbers of more than seven digits; slow on accelerators
  skip_nonfinite: int = 0  # so many non-finite steps in a row are skipped, the next one stops the run
  resume: str = ""  # a workdir whose newest checkpoint to go on from, when this one has none
  # a workdir, published weights, or arm:NAME: parameters to start from, when there is nothing to resume
  init_from: str = ""

  def __post_init__(self):
    for name in ("steps", "batch", "accumulate", "log_every"):
      check(getattr(self, name) >= 1, name, getattr(self, name), "use a whole number of at least 1")
    for name in ("eval_every", "eval_batches", "skip_nonfinite"):
      check(getattr(self, name) >= 0, name, getattr(self, name), "use 0 or a positive whole number")
    check(self.length >= 2, "length", self.length, "a row needs at least 2 tokens")
    check(self.batch % self.accumulate == 0, "batch", self.batch, f"must be a multiple of accumulate={self.accumulate}")
    check(len(self.seeds) > 0, "seeds", self.seeds, "give at least one seed, e.g. --config.seeds=0,1,2")
    check(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "each seed once")
    check(all(0 <= s < 2**31 for s in self.seeds), "seeds", self.seeds, "seeds lie in 0 .. 2^31-1")
    check(all(self.arms), "arms", self.arms, 'each arm is a name and its overrides, ("small", "model.layers=1")')
    names = [name for name, *_ in self.arms]
    check(len(set(names)) == len(names), "arms", names, "each arm needs a name of its own")
    for arm in self.only:
      check(arm in names, "only", arm, f"no such arm; choose from {', '.join(names) or 'none'}")
    for arm in names:
      check(arm.replace("-", "").replace("_", "").isalnum(), "arms", arm, "name arms with letters, digits, - and _")
    check(
      self.tx.warmup < self.steps,
      "tx.warmup",
      self.tx.warmup,
      f"must be less than steps={self.steps}",
    )

  @property
  def seed(self) -> int:
    """The seed of a single run; of several, the first."""
    return self.seeds[0]


def defaults(cls: type) -> ConfigDict:
  """A locked ConfigDict with every field of the dataclass `cls` at its default; all have one."""
  return as_configdict(cls())


def parse_arg(arg: str | None, **options: Any) -> ConfigDict:
  """Parses what stands behind the colon of `--config=file.py:arg`.

  `arg` is a comma-separated list of `name` (a switch) and `name=value`. `tiny`
  always exists; `options` adds others with their defaults. Raises UserError on
  anything else.
  """
  out = ConfigDict({"tiny": False, **options}, allow_dotted_keys=True)
  for item in filter(None, (arg or "").split(",")):
    name, eq, text = item.partition("=")
    if name not in out:
      raise UserError("config", f":{item}", f"unknown; this config takes {', '.join(f':{k}' for k in out)}")
    kind = type(out[name])
    if not eq and kind is not bool:
      raise UserError("config", f":{item}", f"needs a value, e.g. :{name}={out[name]}")
    out[name] = _parse(text if eq else "true", kind, f"config:{name}")
  return out


# The size of a smoke run, by the names every config shares.
_TINY = {
  "steps": 6,
  "batch": 8,
  "length": 32,
  "accumulate": 2,
  "log_every": 2,
  "eval_every": 3,
  "checkpoint.every": 3,
  "tx.warmup": 2,
  "model.layers": 2,
  "model.mlp_width": 64,
  "model.glu_width": 64,
  "model.vocab": 512,
  "data.bpe_vocab": 512,
}


def shrink(cfg: ConfigDict) -> ConfigDict:
  """The same config small enough to run in seconds on a laptop: what `:tiny` means."""
  flat = dict(_flatten(cfg))
  for path, most in _TINY.items():
    if flat.get(path, 0) > most:
      _put(cfg, path, most)
  if "model.heads" in flat:
    heads = min(flat["model.heads"], 4)
    if "model.kv_heads" in flat:
      group = flat["model.heads"] // max(flat["model.kv_heads"], 1)
      cfg.model.kv_heads = max(heads // max(group, 1), 1)
    cfg.model.update(heads=heads, head_dim=16, width=16 * heads)
  cfg.eval_batches = 1  # 0 would be the whole split
  cfg.mesh = as_configdict(MeshConfig(partition=cfg.mesh.partition))
  cfg.seeds = tuple(cfg.seeds)[:2]
  return cfg


def load(spec: str, overrides: Sequence[str] = ()) -> RunConfig:
  """Reads `path/to/config.py:arg`, applies overrides such as `tx.lr=3e-4`, checks and freezes it.

  Returns an instance of the experiment's `Config`. Raises UserError for
  everything that is wrong with the file, the argument, a name, a type or a value.
  """
  path, _, arg = spec.partition(":")
  cfg = _get_config(path, arg)
  cls = experiment_module(cfg.get("experiment", "")).Config
  return freeze(cls, override(cfg, cls, overrides))


def changed(cfg: Any, overrides: Sequence[str]) -> Any:
  """The frozen config `cfg` with each `path=value` set. Raises UserError."""
  return freeze(type(cfg), override(as_configdict(cfg), type(cfg), overrides))


def expand(cfg: RunConfig) -> list[tuple[str, RunConfig]]:
  """The (arm, config) of every single run of `cfg`: its arms x its seeds, arms outermost."""
  runs = []
  for arm, *overrides in cfg.arms or (("main",),):
    if cfg.only and arm not in cfg.only:
      continue
    single = override(as_configdict(dataclasses.replace(cfg, arms=(), only=())), type(cfg), overrides)
    for seed in cfg.seeds:
      single.seeds = (seed,)
      try:
        runs.append((arm, freeze(type(cfg), single)))
      except UserError as e:
        raise e.under(f"arms.{arm}") from None
  return runs


def experiment_module(name: str) -> types.ModuleType:
  """The module `experiments.<name>.experiment`, which has `Config` and `build`."""
  root = pathlib.Path(__file__).resolve().parents[1] / "experiments"
  known = sorted(p.parent.name for p in root.glob("*/experiment.py"))
  check(name in known, "experiment", repr(name), f"no such experiment; choose from {', '.join(known)}")
  return importlib.import_module(f"experiments.{name}.experiment")


def override(cfg: ConfigDict, cls: type, overrides: Sequence[str]) -> ConfigDict:
  """`cfg` with each `path=value` set, parsed by the annotations of `cls`. Raises UserError."""
  cfg = cfg.copy_and_resolve_references()
  for item in overrides:
    path, eq, text = item.partition("=")
    kind = _annotation(cls, path, text if eq else "")
    check(bool(eq), path, "", f"needs a value: --config.{path}=VALUE")
    _put(cfg, path, _parse(text, kind, path))
  return cfg


def freeze(cls: type, cfg: Mapping[str, Any], prefix: str = "") -> Any:
  """An instance of the dataclass `cls` from a (nested) mapping. Raises UserError on any misfit."""
  hints, fields = typing.get_type_hints(cls), _fields(cls)
  for name in cfg:
    check(name in fields, prefix + name, cfg[name], f"no such field; {_suggest(name, fields)}")
  values = {name: _coerce(cfg[name], hints[name], prefix + name) for name in fields if name in cfg}
  try:
    return cls(**values)
  except UserError as e:
    raise UserError(prefix + e.field, e.value, e.fix) from None


def as_configdict(value: Any) -> Any:
  """A (nested) dataclass as locked ConfigDicts, to edit; anything else as it is."""
  if dataclasses.is_dataclass(value):
    return ConfigDict({f: as_configdict(getattr(value, f)) for f in _fields(type(value))}, convert_dict=False).lock()
  return value


def flat(cfg: Any) -> dict[str, Any]:
  """A frozen config as {dotted path: value}."""
  return dict(_flatten(as_configdict(cfg)))


def digest(tree: Any) -> str:
  """A short hash of what JSON can write."""
  return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def _get_config(path: str, arg: str) -> ConfigDict:
  file = pathlib.Path(path)
  check(file.suffix == ".py" and file.is_file(), "config", path, "no such config file (a .py file with get_config)")
  module_spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
  module = importlib.util.module_from_spec(module_spec)
  try:
    module_spec.loader.exec_module(module)
    check(hasattr(module, "get_config"), "config", path, "defines no get_config(arg)")
    cfg = module.get_config(arg)
  except UserError:
    raise
  except Exception as e:  # whatever a config file raises is a mistake in that file
    trace, line = e.__traceback__, ""
    while trace:
      if trace.tb_frame.f_code.co_filename == str(file):
        line = f" line {trace.tb_lineno}:"
      trace = trace.tb_next
    raise UserError("config", path, f"{line} {type(e).__name__}: {one_line(e)}".strip()) from e
  check(isinstance(cfg, ConfigDict), "config", path, "get_config(arg) must return a ConfigDict; see config.defaults")
  return cfg


def _fields(cls: type) -> dict[str, dataclasses.Field]:
  return {f.name: f for f in dataclasses.fields(cls)}


def _flatten(cfg: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in cfg.items():
    if isinstance(value, ConfigDict):
      yield from _flatten(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def _put(cfg: ConfigDict, path: str, value: Any) -> None:
  *groups, name = path.split(".")
  for group in groups:
    cfg = cfg[group]
  with cfg.ignore_type():
    cfg[name] = value


def _paths(cls: type, prefix: str = "") -> Iterator[str]:
  for name, kind in typing.get_type_hints(cls).items():
    if dataclasses.is_dataclass(kind):
      yield from _paths(kind, f"{prefix}{name}.")
    else:
      yield prefix + name


def _suggest(name: str, names) -> str:
  close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
  return f"did you mean {close[0]}?" if close else f"choose from {', '.join(names)}"


def _annotation(cls: type, path: str, text: str) -> Any:
  """The type of the field at `path`. Raises UserError when there is none or it cannot be set in one go."""
  kind: Any = cls
  group = ""  # the names before
  for name in path.split("."):
    hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
    if name not in hints:
      known = list(_paths(cls))
      close = difflib.get_close_matches(path, known, n=1, cutoff=0.7)
      close = close or [p for p in known if p.endswith("." + path.rsplit(".")[-1])]
      near = [group + field for field in hints] or list(typing.get_type_hints(cls))
      fix = f"did you mean {close[0]}?" if close else f"choose from {', '.join(near)}"
      raise UserError(path, text, f"no such field; {fix}")
    group += name + "."
    kind = hints[name]
  if dataclasses.is_dataclass(kind):
    raise UserError(path, text, f"is a group; set one of its fields: {', '.join(_paths(kind, path + '.'))}")
  if typing.get_args(kind) and typing.get_origin(typing.get_args(kind)[0]) is tuple:
    raise UserError(path, text, "is set in the config file; choose among its entries with only=NAME")
  return kind


def _parse(text: str, kind: Any, path: str) -> Any:
  """`text` from the command line as a value of type `kind`. Raises UserError."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin is tuple:
    items = [item.strip().strip("'\"") for item in text.strip("()[] ").split(",")]
    return tuple(_parse(item, args[0], path) for item in items if item)
  if kind is bool:
    lowered = text.lower()
    check(lowered in ("true", "false", "1", "0"), path, text, "is a switch; use true or false")
    return lowered in ("true", "1")
  if kind in (int, float):
    try:
      value = kind(text)
    except ValueError:
      example = "an integer, e.g. 8" if kind is int else "a number, e.g. 3e-4"
      raise UserError(path, text or "''", f"must be {example}") from None
    return _coerce(value, kind, path)
  return _coerce(text, kind, path)


def _coerce(value: Any, kind: Any, path: str) -> Any:
  """`value` as `kind`, or UserError. Only int -> float and list -> tuple are converted."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if dataclasses.is_dataclass(kind):
    return value if isinstance(value, kind) else freeze(kind, value, path + ".")
  if origin is Literal:
    check(value in args, path, value, f"choose from {', '.join(map(str, args))}")
    return value
  if origin is tuple:
    check(isinstance(value, (tuple, list)), path, value, f"must be a tuple, as in {path} = (...,)")
    return tuple(_coerce(item, args[0], path) for item in value)
  if kind is float and type(value) is int:
    return float(value)
  check(type(value) is kind, path, value, f"must be of type {kind.__name__}, not {type(value).__name__}")
  if kind is float:
    check(math.isfinite(value), path, value, "must be finite")
    check(value == 0 or 1e-37 < abs(value) < 1e38, path, value, "is out of float32's range")
  if kind is int:
    check(abs(value) < 2**31, path, value, "must be below 2^31")
  return value
