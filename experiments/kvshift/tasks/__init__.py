"""The synthetic tasks: random access to rows with answers. `TASKS` names them for `--config.task`."""

from experiments.kvshift.tasks.hops import HopsRows
from experiments.kvshift.tasks.induction import InductionRows
from experiments.kvshift.tasks.math import MathRows
from experiments.kvshift.tasks.ngram import NgramRows

# name -> (its config, the model's vocabulary, row length, seed, split) -> a sequence of rows; see tasks/rows.py
TASKS = {"induction": InductionRows, "ngram": NgramRows, "hops": HopsRows, "math": MathRows}
