"""The synthetic tasks: random access to rows with answers. `TASKS` names them for `--config.task`."""

from experiments.kvshift.tasks.induction import InductionRows

# name -> (its config, the model's vocabulary, row length, seed, split) -> a sequence of rows; see tasks/rows.py
TASKS = {"induction": InductionRows}
