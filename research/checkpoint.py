"""Checkpoints of a run: all of a step or none of it, and never a wrong number.

The only file that imports orbax. On disk, one directory a step:

    <directory>/<step>/arrays/              every array of the state, by its path in the pytree
    <directory>/<step>/record/data.json     step, shape, dtype and hash of every array,
                                            data_state, metadata; and a sha256 over all that
    <directory>/<step>.orbax-checkpoint-tmp a save under way, or one that was killed
    <directory>/<step>.damaged              set aside by `Checkpoints.restore(..., quarantine=True)`

orbax renames the temporary directory when both parts are written, so a step that
has its plain name is complete. In a bucket no directory can be renamed: a step is
written under its plain name, and complete once it has a `commit_success.txt`. orbax
notices neither flipped bits nor a changed dtype: the record is there for that.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import gc
import hashlib
import itertools
import json
import logging
import os
import sys
from typing import Any
import warnings

from etils import epath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from research import paths
from research.errors import UserError, check, first_line

_log = logging.getLogger(__name__)
TEMPORARY = ".orbax-checkpoint-tmp"
COMMITTED = "commit_success.txt"  # in a bucket


@dataclasses.dataclass(frozen=True)
class Restored:
  """One step as it was saved; `state` has the structure and shardings that were asked for."""

  step: int
  state: Any
  data_state: Any
  metadata: Any


class SaveFailed(Exception):
  """A step could not be written (a full disk, say); earlier steps are as they were."""


class _Damaged(Exception):
  """What was read is not what was written; one line."""


class Checkpoints:
  """The checkpoints under `directory` (a local or shared path, or in a bucket), one writer at a time.

  In a run of several processes every method but `steps` is called by all of them; one alone
  may `restore` to its own devices.

  Args:
    directory: made by the first save.
    keep_last: how many of the newest steps stay; at least 1.
    keep_every: steps divisible by it stay for good; 0 for none.

  Attributes:
    reports: one line for each damaged step that `restore` met.
  """

  def __init__(self, directory: str | os.PathLike, keep_last: int = 2, keep_every: int = 0):
    check(keep_last >= 1, "keep_last", keep_last, "keep at least one checkpoint")
    check(keep_every >= 0, "keep_every", keep_every, "use a number of steps, or 0 for none")
    directory = paths.parse(directory, "directory")
    self.bucket = paths.in_bucket(directory)
    self.directory = epath.Path(directory if self.bucket else os.path.abspath(directory))
    self.keep_last, self.keep_every = keep_last, keep_every
    self.reports: list[str] = []
    self._pending: tuple[int, ocp.AsyncResponse[None]] | None = None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def steps(self) -> list[int]:
    """The finished steps, ascending. A step may still turn out to be damaged."""
    return [step for step in self._begun() if not self.bucket or (self.directory / str(step) / COMMITTED).exists()]

  def _begun(self) -> list[int]:
    """The steps that have their plain name, ascending: where that comes last, the finished ones."""
    if not self.directory.exists():
      return []
    names = (path.name for path in self.directory.iterdir())
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)

  def save(self, step: int, state: Any, data_state: Any, metadata: Any) -> None:
    """Starts to save; on return `state` may be donated.

    Waits for the save before this one. Of several processes, the first one's
    `data_state` and `metadata` (both JSON-able) are kept.

    Raises:
      SaveFailed: this save could not start, or the one before it failed.
    """
    self.wait()
    arrays = _flatten(state)[0]
    plain = {name: _plain(array) for name, array in arrays.items()}
    hashes = fingerprints(plain)
    content = {
      "step": step,
      "arrays": {name: _signature(array) | {"hash": hashes[name]} for name, array in arrays.items()},
      "data_state": data_state,
      "metadata": metadata,
    }
    content = json.loads(json.dumps(content))  # as it will be read back: tuples are lists, keys are strings
    parts = {
      "arrays": {name: array for name, array in plain.items() if array.size},  # orbax refuses empty arrays
      "record": {"content": content, "sha256": _digest(content)},
    }
    with self._failing_as(step), _orbax_context():
      if self.bucket:
        self._remove_leftovers()  # one may be in the way, under the plain name
        multihost_utils.sync_global_devices("checkpoint leftovers")
      self._pending = step, ocp.save_checkpointables_async(self.directory / str(step), parts)

  def wait(self) -> None:
    """Returns when nothing is being saved, and then removes what retention no longer holds.

    Raises:
      SaveFailed: the save failed (a full disk, say); earlier steps are as they were.
    """
    pending, self._pending = self._pending, None
    if pending is not None:
      step, response = pending
      with self._failing_as(step):
        response.result()
      self._remove_old(step)

  def close(self) -> None:
    """Waits for the save under way; raises what it raised."""
    self.wait()

  def restore(
    self, abstract_state: Any, step: int | None = None, quarantine: bool = False, partial: bool = False
  ) -> Restored | None:
    """The newest sound step, or `step`; None if there is no checkpoint at all.

    A damaged step is reported (`reports`, and a warning in the log) and the one
    before it is tried. Nothing is removed.

    Args:
      abstract_state: the state's pytree with a `jax.ShapeDtypeStruct` for every
        leaf, its sharding on the mesh to restore to (any mesh).
      step: this step and no other.
      quarantine: rename the damaged steps passed over to `<step>.damaged`, so
        that the run can save them again. For a run's own directory, not for
        one it only reads.
      partial: the step may hold more arrays than `abstract_state`, which are not read.

    Raises:
      UserError: the state differs from the saved one in an array's name, shape or
        dtype; every step is damaged; or there is no such `step`.
    """
    self.wait()
    expected, treedef = _flatten(abstract_state)
    for leaf in expected.values():
      leaf.sharding.shard_shape(leaf.shape)  # a misfit is the caller's, not damage: let it raise here
    steps = self.steps()
    check(step is None or step in steps, "step", step, f"{self.directory} has the steps {steps}")
    damaged: list[tuple[int, str]] = []
    for candidate in reversed(steps) if step is None else [step]:
      with _hushed():
        try:
          arrays, content = self._read(candidate, expected, partial)
        except _Damaged as error:
          if self.bucket:
            paths.parse(os.fspath(self.directory), "checkpoint")  # raises where only the way there is out of order
          damaged.append((candidate, str(error)))
          arrays = None
        if arrays is None:
          gc.collect()  # what `_hushed` is there to hide
          continue
      self._report(damaged, f"using step {candidate}")
      if quarantine:
        self.set_aside(*(number for number, _ in damaged))
      state = jax.tree.unflatten(treedef, arrays)
      return Restored(candidate, state, content["data_state"], content["metadata"])
    if not damaged:
      return None
    self._report(damaged, "nothing older to use")
    reasons = "; ".join(f"{number}: {reason}" for number, reason in damaged[:3])
    raise UserError(
      "checkpoint",
      self.directory,
      f"every step that could be used is damaged ({reasons}); restore the files from a copy,"
      " or start afresh in another directory",
    )

  def _read(self, step: int, expected: Mapping[str, Any], partial: bool) -> tuple[list[jax.Array], dict[str, Any]]:
    """The arrays in the order of `expected`, and the record's content. Raises _Damaged and UserError."""
    path = self.directory / str(step)
    together = not all(leaf.sharding.is_fully_addressable for leaf in expected.values())
    with _damage(together), _orbax_context(alone=True):
      record = ocp.load_checkpointables(path, {"record": None})["record"]
      content = record["content"]
      if _digest(content) != record["sha256"]:
        raise _Damaged("record: hash differs")
      if content["step"] != step:
        raise _Damaged(f"record: holds step {content['step']}")
    saved = content["arrays"]
    if partial:
      saved = {name: saved[name] for name in expected if name in saved}
    _check_same(path, saved, {name: _signature(leaf) for name, leaf in expected.items()})
    plain = {name: _abstract_plain(leaf) for name, leaf in expected.items()}
    with _damage(together), _orbax_context(alone=True):
      filled = {name: leaf for name, leaf in plain.items() if leaf.size}
      arrays = ocp.load_checkpointables(path, {"arrays": filled})["arrays"] if filled else {}
      # Where its own index has lost an array, a partial load hands the abstract one back.
      lost = [name for name in filled if not isinstance(arrays[name], jax.Array)]
      if lost:
        raise _Damaged(f"{_some(lost)}: lost")
      arrays = {name: arrays[name] if leaf.size else _empty(leaf) for name, leaf in plain.items()}
    hashes = fingerprints(arrays)
    wrong = [name for name in expected if hashes[name] != saved[name]["hash"]]
    if wrong:
      raise _Damaged(f"{wrong[0]}: hash differs" + (f", and {len(wrong) - 1} more" if wrong[1:] else ""))
    return [_typed(arrays[name], leaf.dtype) for name, leaf in expected.items()], content

  def _report(self, damaged: list[tuple[int, str]], outcome: str) -> None:
    for step, reason in damaged:
      self.reports.append(f"checkpoint step {step} is damaged ({reason}); {outcome}")
      _log.warning("%s: %s", self.directory, self.reports[-1])

  def set_aside(self, *steps: int) -> None:
    """Renames steps to `<step>.damaged`: they neither count nor go, and can be saved again."""
    if jax.process_index() == 0:
      for step in steps:
        names = (f"{step}.damaged" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
        name = next(name for name in names if not (self.directory / name).exists())
        paths.move(self.directory / str(step), self.directory / name)
    multihost_utils.sync_global_devices("checkpoint set aside")

  def _remove_old(self, saved: int) -> None:
    """Removes the steps behind `saved` that retention lets go, and what killed saves left."""
    if jax.process_index() == 0:
      # A step beyond `saved` is one that a restore passed over: it neither counts nor goes.
      steps = [step for step in self.steps() if step <= saved]
      for step in steps[: -self.keep_last]:
        if not (self.keep_every and step % self.keep_every == 0):
          self._remove(self.directory / str(step))
      self._remove_leftovers()
    multihost_utils.sync_global_devices("checkpoint retention")

  def _remove_leftovers(self) -> None:
    """Removes what killed saves left."""
    if jax.process_index() == 0:
      unfinished = sorted(set(self._begun()) - set(self.steps())) if self.bucket else []
      for leftover in (*self.directory.glob(f"*{TEMPORARY}"), *(self.directory / str(step) for step in unfinished)):
        self._remove(leftover)

  def _remove(self, path: epath.Path) -> None:
    if self.bucket:
      (path / COMMITTED).unlink(missing_ok=True)  # first: a step of which some is left must not look complete
    path.rmtree()

  @contextlib.contextmanager
  def _failing_as(self, step: int) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      raise SaveFailed(f"step {step} was not saved in {self.directory}: {_reason(error)}") from error


def fingerprints(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
  """A 64-bit hash of each array's bits, whatever its sharding; computed where the arrays are.

  Each 32-bit word goes through a bijection that its place in the array picks, and
  the results are summed modulo 2^32; twice, with two bijections. So one changed
  element always changes both sums, and sums do not care how the array is cut.
  Places 2^32 words apart look alike, and an adversary is not kept out.
  """
  # A program for each shape and dtype, not one for all arrays: XLA takes as long for each, and most
  # arrays of a state share theirs. Each is awaited: virtual CPU devices abort when programs queue up.
  sums = {name: jax.block_until_ready(_hash(array)) for name, array in arrays.items()}
  return {name: f"{int(first):08x}{int(second):08x}" for name, (first, second) in sums.items()}


@jax.jit
def _hash(array: jax.Array) -> tuple[jax.Array, jax.Array]:
  words = _words(array)
  place = jnp.zeros((), jnp.uint32)
  for axis, size in enumerate(words.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
  terms = tuple(_mix(words ^ _mix(place, *odd), *odd) for odd in ((0x85EBCA6B, 0xC2B2AE35), (0x7FEB352D, 0x846CA68B)))
  # One reduction of pairs: as two sums, XLA's CPU backend writes both terms out at full size.
  add = lambda a, b: (a[0] + b[0], a[1] + b[1])
  zero = jnp.zeros((), jnp.uint32)
  return jax.lax.reduce(terms, (zero, zero), add, tuple(range(words.ndim)))


def _mix(x: jax.Array, first: int, second: int) -> jax.Array:
  """MurmurHash3's finaliser: a bijection of uint32 for any two odd factors."""
  x = (x ^ (x >> 16)) * jnp.uint32(first)
  x = (x ^ (x >> 13)) * jnp.uint32(second)
  return x ^ (x >> 16)


def _words(array: jax.Array) -> jax.Array:
  """The bits as uint32: narrow types zero-extended, 64-bit types as two words along a new last axis."""
  if array.dtype == jnp.bool_:
    return array.astype(jnp.uint32)
  width = min(8 * array.dtype.itemsize, 32)
  return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{width}")).astype(jnp.uint32)


def _flatten(tree: Any) -> tuple[dict[str, Any], Any]:
  """{path: leaf} in the tree's order, and its treedef."""
  leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
  named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
  if len(named) != len(leaves):
    raise ValueError("two arrays of the state have the same path; dict keys must not contain '/'")
  return named, treedef


def _is_key(dtype: Any) -> bool:
  return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _plain(array: jax.Array) -> jax.Array:
  return jax.random.key_data(array) if _is_key(array.dtype) else array


def _typed(array: jax.Array, dtype: Any) -> jax.Array:
  """Undoes `_plain`."""
  return jax.random.wrap_key_data(array, dtype=dtype) if _is_key(dtype) else array


def _abstract_plain(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """`_plain` of an abstract leaf. The words of a key are a new last axis, which no spec cuts."""
  if not _is_key(leaf.dtype):
    return leaf
  data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _empty(leaf: jax.ShapeDtypeStruct) -> jax.Array:
  return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: np.zeros(leaf.shape, leaf.dtype)[index])


def _signature(leaf: Any) -> dict[str, Any]:
  return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _check_same(path: epath.Path, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
  """Raises UserError where the arrays of a sound record are not the ones expected."""
  fix = "the model's or the optimizer's config has changed; put it back, or use another directory"
  for kind, names in (("lacks", expected.keys() - saved.keys()), ("also holds", saved.keys() - expected.keys())):
    check(not names, "checkpoint", path, f"{kind} {_some(sorted(names))}: {fix}")
  shapes = [
    f"{name} {saved[name]['shape']} (now {expected[name]['shape']})"
    for name in expected
    if saved[name]["shape"] != expected[name]["shape"]
  ]
  check(not shapes, "checkpoint", path, f"holds {_some(shapes)}: {fix}")
  for name in expected:
    was, now = saved[name]["dtype"], expected[name]["dtype"]
    check(was == now, name, now, f"{path} holds it as {was}, and nothing is cast on the way; ask for {was}")


def _some(items: list[str]) -> str:
  return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if items[3:] else "")


def _digest(content: Any) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _orbax_context(alone: bool = False) -> ocp.Context:
  """`record` is JSON and not a pytree; `alone`: no barriers, for a read that may fail on one process only."""
  context = ocp.Context()
  context.pytree.loading.partial_load = True  # which arrays there must be is for `_check_same` to say
  context.checkpointables.registry = ocp.handlers.local_registry().add(
    ocp.handlers.JsonHandler, checkpointable_name="record"
  )
  if alone and jax.process_count() > 1:
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
  return context


@contextlib.contextmanager
def _damage(together: bool) -> Iterator[None]:
  """What a read raises becomes `_Damaged`; `together`: on every process if on one.

  orbax raises whatever lies beneath: ValueError, KeyError, bare Exception; so
  the exceptions that are not damage are the ones to name: those of the runtime
  (memory, peers) and KeyboardInterrupt, which orbax wraps as well.
  """
  reason = None
  try:
    yield
  except Exception as error:
    root = _root(error)
    if isinstance(root, jax.errors.JaxRuntimeError) or not isinstance(root, Exception):
      raise root from None
    reason = _reason(error)
  if together:
    failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(reason is not None)))
    reason = reason or (f"process {failed[0]} could not read it" if failed.size else None)
  if reason is not None:
    raise _Damaged(reason)


def _root(error: BaseException) -> BaseException:
  while error.__cause__ is not None:
    error = error.__cause__
  return error


def _reason(error: BaseException) -> str:
  root = _root(error)
  text = first_line(root)
  return text if isinstance(root, _Damaged) else f"{type(root).__name__}: {text}"


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
  """Hides what orbax's abandoned reads raise as they are collected: a hundred lines for each damaged step."""
  hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", RuntimeWarning)  # coroutines never awaited
      yield
  finally:
    sys.unraisablehook = hook
