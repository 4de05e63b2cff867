"""Where a run's numbers go: JSON lines (the truth), TensorBoard beside them, a line or a bar for people."""

import io
import json
import math
import os
import pathlib
import sys
import tempfile
import time

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from research import paths
from research.errors import check

SHOWN = 12  # metrics of an evaluation on the terminal; all of them are in the file


class Writer:
  """Writes the metrics of one run (an arm and a seed) into its workdir.

  All runs of a workdir share `metrics.jsonl`; every line has arm, seed, kind
  ("train" or "eval") and step, the number of updates made before it. Only process
  0 writes. In a bucket, whose objects cannot be appended to, it all comes at `flush`.
  """

  def __init__(self, workdir: paths.Path, arm: str, seed: int, steps: int):
    self.path = workdir / "metrics.jsonl"
    self.board_dir = workdir / "tensorboard" / f"{arm}-{seed}"
    self.run = {"arm": arm, "seed": seed}
    self.steps = steps
    self.bucket = paths.in_bucket(workdir)
    self.active = jax.process_index() == 0
    self.file = self.board = self.bar = None
    self.local = None  # where TensorBoard files of a bucket are made

  def start(self, step: int) -> None:
    """Opens the files for a run that (re)starts at `step`; lines it will write again are dropped."""
    self.first, self.started = step, time.perf_counter()
    if not self.active:
      return
    kept = [r for r in read(self.path) if not (r.items() >= self.run.items() and r["step"] >= step)]
    text = "".join(json.dumps(r) + "\n" for r in kept)
    paths.write(self.path, text)
    if self.bucket:
      self.file = io.StringIO(text)
      self.file.seek(0, io.SEEK_END)
      self.local = tempfile.TemporaryDirectory()
    else:
      self.file = self.path.open("a")
    self.board = SummaryWriter(self.local.name if self.bucket else str(self.board_dir), purge_step=step)
    if sys.stderr.isatty():
      self.bar = tqdm(total=self.steps, initial=step, desc=self._name(), unit="step", dynamic_ncols=True)

  def say(self, what: str) -> None:
    """A line for people."""
    if self.active:
      print(f"{self._name()}  {what}", file=sys.stderr, flush=True)

  def write(self, kind: str, step: int, metrics: dict[str, float]) -> None:
    """One JSON line, one TensorBoard point a metric, and the terminal."""
    if self.file is None:
      return
    numbers = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no NaN
    self.file.write(json.dumps({**self.run, "kind": kind, "step": step, **numbers}) + "\n")
    self.file.flush()
    for name, value in metrics.items():
      self.board.add_scalar(f"{kind}/{name}", value, step)
    self._show(kind, step, metrics)

  def flush(self) -> None:
    """Returns once everything written is on disk, or in the bucket."""
    if self.file is None:
      return
    if self.bucket:
      self.path.write_text(self.file.getvalue())
    else:
      self.file.flush()
      os.fsync(self.file.fileno())
    self.board.flush()
    if self.bucket:
      for events in pathlib.Path(self.local.name).iterdir():
        (self.board_dir / events.name).write_bytes(events.read_bytes())

  def close(self) -> None:
    if self.file is not None:
      self.flush()
      self.file.close()
      self.board.close()
    if self.local is not None:
      self.local.cleanup()
    if self.bar is not None:
      self.bar.close()

  def _name(self) -> str:
    return f"{self.run['arm']} seed {self.run['seed']}"

  def _show(self, kind: str, step: int, metrics: dict[str, float]) -> None:
    if kind == "eval":
      said = [f"{k} {v:.4f}" for k, v in metrics.items()]
      if len(said) > SHOWN:
        said[SHOWN:] = [f"and {len(said) - SHOWN} more in {self.path.name}"]
      line = f"{self._name()}  step {step}/{self.steps}  validation: {'  '.join(said)}"
      self.bar.write(line, file=sys.stderr) if self.bar is not None else print(line, file=sys.stderr, flush=True)
      return
    rate = metrics["tokens_per_second"]
    if self.bar is not None:
      self.bar.n = step + 1
      self.bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {_si(rate)} tokens/s", refresh=True)
      return
    done = step + 1 - self.first
    eta = (time.perf_counter() - self.started) / max(done, 1) * (self.steps - step - 1)
    minutes, seconds = divmod(round(eta), 60)
    print(
      f"{self._name()}  step {step}/{self.steps}  loss {metrics['loss']:.4f}  "
      f"{_si(rate)} tokens/s  ETA {minutes}:{seconds:02d}",
      file=sys.stderr,
      flush=True,
    )


def read(path: paths.Path) -> list[dict]:
  """The records of a `metrics.jsonl`; a last line that a crash cut short is left out.

  Raises UserError for any other line that is not a record.
  """
  if not path.exists():
    return []
  records = []
  lines = path.read_bytes().split(b"\n")
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line) if line else None
      if record is not None:
        records.append({**record, "step": int(record["step"])})
    except (ValueError, KeyError, TypeError):
      check(
        not any(lines[number:]),
        "workdir",
        path,
        f"line {number} is damaged; remove that line, or use another --workdir",
      )
  return records


def _si(x: float) -> str:
  for unit in ("", "k", "M", "G"):
    if x < 1000:
      return f"{x:.3g}{unit}"
    x /= 1000
  return f"{x:.3g}T"
