"""Theory: theorem 2's head made by hand solves induction; the loss of theorem 3; and where a trained head goes.

arXiv 2411.19574, sections 2 and 3, figure 2, with its misprints corrected (see `experiments/kvshift/theory.py`). The
hand-built head and the contours need no training. Three small heads are trained on the induction task, all their
weights and not the coefficients alone as the theorem has it, to see where their coefficients go.
Cost: about 1 minute on 2 CPU cores.

  python -m experiments.kvshift --config=experiments/kvshift/configs/theory.py
"""

from experiments.kvshift.experiment import Config
from research import config


def get_config(arg=None):
  arg = config.parse_arg(arg)
  c = config.defaults(Config)
  c.task, c.report = "induction", "theory"
  c.steps, c.batch, c.length = 500, 64, 64
  c.seeds = (0, 1, 2)
  c.model.update(vocab=64, width=64, layers=1, heads=1, kv_heads=1, head_dim=64, mlp_width=192)
  c.model.update(rope_base=100_000.0, precision="float32")
  c.tx.update(lr=1e-3, warmup=50, schedule="constant", weight_decay=0.0)
  c.eval_every = 50
  return config.shrink(c) if arg.tiny else c
