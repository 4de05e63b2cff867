"""A step of a run once more, bit for bit: `python -m research.tools.replay --workdir=DIR --step=N`.

Goes on from the newest checkpoint at or before step N, or from the run's start, on the run's own mesh, and compares
every logged loss on the way with the log. Then shows the batch of step N: the loss of each row before the update, worst
first, and the documents in it; of the worst row (or `--row`) the loss of each document and its text. That is how the
document behind a spike is found. Nothing of the run is changed.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
import sys
from typing import Any

import jax
import numpy as np

from research import config, cpu, data, fit, paths, run, runs, writers
from research import mesh as meshes
from research.checkpoint import Checkpoints
from research.config import RunConfig
from research.errors import check
from research.markdown import table

TEXT = 400  # characters shown of a document


@dataclasses.dataclass(frozen=True)
class Replayed:
  """state: before the step. batch: what it takes. compared: {step: (loss now, loss in the log)}, the step's own too."""

  exp: fit.Experiment
  cfg: RunConfig
  state: fit.TrainState
  batch: Mapping[str, np.ndarray]
  start: int
  compared: dict[int, tuple[float, float]]
  reference: Any


def main() -> None:
  cpu.tune()
  parser = run.Parser(prog="python -m research.tools.replay", description=__doc__.split(":")[0])
  parser.add_argument("--workdir", required=True, metavar="DIR", help="of the run")
  parser.add_argument("--run", metavar="ARM-SEED", help="which of the workdir's runs, if it has several")
  parser.add_argument("--step", required=True, type=int, metavar="N", help="as `step` in metrics.jsonl")
  parser.add_argument("--row", type=int, metavar="I", help="of the batch, to show (default: the worst)")
  args = parser.parse_args()
  name, cfg = runs.find(args.workdir, args.run)
  check(0 <= args.step < cfg.steps, "step", args.step, f"the run has the steps 0 to {cfg.steps - 1}")
  check(args.row is None or 0 <= args.row < cfg.batch, "row", args.row, f"a batch has the rows 0 to {cfg.batch - 1}")
  run.compilation_cache()
  with run.double(cfg.x64):
    mesh, exp = run.prepare(config.experiment_module(cfg.experiment).build, cfg)
    with jax.set_mesh(mesh):
      same = show(replay(paths.parse(args.workdir), name, cfg, mesh, exp, args.step), args.step, args.row)
  if not same:
    sys.exit(1)


def replay(
  workdir: paths.Path, name: str, cfg: RunConfig, mesh: jax.sharding.Mesh, exp: fit.Experiment, step: int
) -> Replayed:
  """Trains from the nearest checkpoint to the state before `step`. Under the run's mesh. Raises UserError."""
  arm = name.rpartition("-")[0]
  names = [arm for arm, *_ in runs.read_config(workdir).arms]
  starts = run.start_points(cfg, arm, mesh, exp, workdir, names)
  check("resume" not in starts, "resume", cfg.resume, "the run began in another workdir; replay that one")
  exp.prepare(functools.partial(run.sibling, workdir, cfg))
  abstract = fit.abstract_state(exp)
  rows = iter(exp.data("train"))
  checkpoints = Checkpoints(runs.checkpoint_dir(workdir, arm, cfg.seed))
  saved = [s for s in checkpoints.steps() if s <= step]
  init_from = starts.get("init_from")
  if saved:
    restored = checkpoints.restore(meshes.on_devices(abstract), step=saved[-1])
    rows.set_state(restored.data_state)
    state, start = restored.state, restored.step
  else:
    state, start = fit.start_state(exp, cfg, meshes.on_devices(abstract), init_from), 0
  reference = fit.frozen(exp, cfg, abstract, init_from)
  step_fn = fit.jit_step(exp, cfg, abstract)
  log = _logged(workdir, name)
  compared = {}
  for now in range(start, step):
    state, metrics = jax.block_until_ready(step_fn(state, meshes.to_devices(next(rows)), reference))
    if now in log:
      compared[now] = (float(metrics["loss"]), log[now])
  batch = next(rows)
  if step in log:  # the step itself, of a copy: the state before it is what the rows' losses are of
    kept = jax.tree.map(lambda x: x.copy(), state)
    _, metrics = jax.block_until_ready(step_fn(kept, meshes.to_devices(batch), reference))
    compared[step] = (float(metrics["loss"]), log[step])
  return Replayed(exp, cfg, state, batch, start, compared, reference)


def row_losses(replayed: Replayed, weights: Iterable[np.ndarray]) -> list[float]:
  """The mean loss of the batch under each of `weights`, which stand in the place of its own."""
  exp, key = replayed.exp, jax.random.fold_in(replayed.state.key, replayed.state.step)
  reference = fit.if_any(replayed.reference)
  loss = jax.jit(lambda model, batch: exp.loss(model, batch, key, *reference)["loss"].value)
  of = lambda w: jax.block_until_ready(loss(replayed.state.model, meshes.to_devices(replayed.batch | {"weights": w})))
  return [float(of(w)) for w in weights]


def show(replayed: Replayed, step: int, row: int | None) -> bool:
  """Prints what was found; False where a loss differs from the log's."""
  cfg, batch = replayed.cfg, replayed.batch
  differ = {s: pair for s, pair in replayed.compared.items() if pair[0] != pair[1]}
  print(f"from step {replayed.start}: {len(replayed.compared)} logged losses met, {len(differ)} differ")
  for at, (ours, logged) in sorted(differ.items())[:3]:
    print(f"  step {at}: {ours!r} here, {logged!r} in the log (another machine, mesh, jax or corpus?)")
  if step in replayed.compared:
    print(f"step {step}: loss {replayed.compared[step][0]!r}")
  if "weights" not in batch:
    print("the rows of this experiment's batches have no weights: a loss for each of them is not defined")
    return not differ
  losses = row_losses(replayed, (_only(batch["weights"], i) for i in range(cfg.batch)))
  named = _documents(replayed, step)
  worst = sorted(range(cfg.batch), key=lambda i: -losses[i])
  cells = [[i, f"{losses[i]:.4f}", named(i)] for i in worst]
  print("\n" + table(["row", "loss", "documents" if named(0) else ""], cells))
  chosen = worst[0] if row is None else row
  if "segment_ids" in batch and batch["segment_ids"].ndim == 2:
    _show_row(replayed, chosen, named(chosen))
  return not differ


def _show_row(replayed: Replayed, row: int, named: str) -> None:
  """The documents of a row of text: their losses, and what they say."""
  batch, cfg = replayed.batch, replayed.cfg
  segments = np.unique(batch["segment_ids"][row][batch["weights"][row] > 0])
  weights = _only(batch["weights"], row)
  losses = row_losses(replayed, (weights * (batch["segment_ids"] == s) for s in segments))
  tokenizer = data.load_tokenizer(cfg.data) if _reads_text(replayed) else None
  names = named.split(", ") if named else []
  for k, (segment, loss) in enumerate(zip(segments, losses, strict=True)):
    ids = batch["targets"][row][(batch["segment_ids"][row] == segment) & (batch["weights"][row] > 0)]
    about = names[k] if k < len(names) else f"segment {segment}"
    text = " ".join(map(str, ids))
    if tokenizer:
      text = tokenizer.decode([i for i in ids if i != tokenizer.eod]).decode(errors="replace")
    cut = text if len(text) <= TEXT else text[:TEXT] + " ..."
    print(f"\nrow {row}, {about}: {len(ids)} tokens, loss {loss:.4f}\n{cut}")


def _only(weights: np.ndarray, row: int) -> np.ndarray:
  """The weights of one row, and zeros."""
  out = np.zeros_like(weights)
  out[row] = weights[row]
  return out


def _documents(replayed: Replayed, step: int):
  """row of the batch -> the names of its documents, or where its rows stand, in words; "" where there are none."""
  cfg = replayed.cfg
  if not _reads_text(replayed):
    return lambda row: ""
  text = data.load(cfg.data, cfg.length, cfg.seed)
  rows = data.training_rows(text.split("train"), cfg.batch, step, seed=cfg.seed)

  def words(row: int) -> str:
    part, i = rows[row]
    return ", ".join(text.parts[part]["train"].documents_of(i)) or f"row {i} of {cfg.data.source[part]}"

  return words


def _reads_text(replayed: Replayed) -> bool:
  return isinstance(getattr(replayed.cfg, "data", None), data.TextConfig) and "tokenizer" in replayed.exp.info()


def _logged(workdir: paths.Path, name: str) -> dict[int, float]:
  lines = writers.read(workdir / "metrics.jsonl")
  return {r["step"]: r["loss"] for r in lines if r["kind"] == "train" and f"{r['arm']}-{r['seed']}" == name}


if __name__ == "__main__":
  run.guard(main)
