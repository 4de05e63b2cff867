"""Step-by-step arithmetic: whole solutions right, on problems of the greatest number of steps trained on.

Reproduces in miniature table 7 of arXiv 2411.19574 (iGSM; there tests go beyond the training problems: train 12 steps,
test 15, and train 21, test 24), on our own generator. As it stands the easier of two difficulties (1 .. 2 steps, the
test 2); `:hard` has 1 .. 3, the test 3. `--config.math.test=3` tests beyond the training problems, too.
Cost: about 5 minutes on 2 CPU cores, 7 with `:hard`.

  python -m experiments.kvshift --config=experiments/kvshift/configs/math.py
"""

from experiments.kvshift.experiment import Config
from experiments.kvshift.tasks.math import longest_problem
from research import config

ARGS = ("hard",)


def get_config(arg=None):
  arg = config.parse_arg(arg, hard=False)
  c = config.defaults(Config)
  c.task, c.report = "math", "accuracy"
  c.seeds = (0, 1, 2)
  c.arms = (("plain", "attention=plain"), ("kvshift", "attention=kvshift"))
  c.math.update(modulus=7, distractors=1, train_least=1, train_most=3 if arg.hard else 2, test=3 if arg.hard else 2)
  c.steps, c.batch = 800, 48
  c.length = longest_problem(c.math.train_most + 1, c.math.distractors)
  c.model.update(vocab=64, width=64, layers=3, heads=2, kv_heads=2, head_dim=32, mlp_width=192)
  c.model.update(rope_base=100_000.0, precision="float32")
  c.tx.update(lr=3e-3, warmup=100, schedule="cosine", weight_decay=0.0)
  c.eval_every = 200
  if arg.tiny:
    c = config.shrink(c)
    c.math.update(train_least=1, train_most=1, test=1, distractors=1)
  return c
