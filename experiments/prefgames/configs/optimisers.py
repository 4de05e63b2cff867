"""Optimisers: momentum and Adam against last-iterate convergence on a cycle.

The theory of Nash learning takes plain gradient steps, its language models AdamW. Online IPO (uniform pairs) and EGPO,
whose half step restores the optimiser's state as well as the policy, on rock-paper-scissors with tilted references,
under SGD, momentum, Adam with and without it, and optax's optimistic rules; every rule at six learning rates, the
best of which is drawn. The gradient is exact. Not in EGPO's paper (arXiv 2503.08942).
Cost: about 1 minute on 2 CPU cores.

  python -m experiments.prefgames --config=experiments/prefgames/configs/optimisers.py
"""

from experiments.prefgames.experiment import Config
from research import config

METHODS = ("online_ipo_uniform", "egpo")
RULES = ("sgd", "momentum", "optimistic", "adam", "adam_b1_0", "optimistic_adam")
RATES = "0.00003,0.0001,0.0003,0.001,0.003,0.01"  # SGD's eta = 4 lr / (b n): 0.004 to 1.3


def get_config(arg=None):
  arg = config.parse_arg(arg)
  c = config.defaults(Config)
  c.report = "optimisers"
  c.steps, c.batch, c.length, c.seeds = 100, 32, 3, (0, 1, 2)
  c.tx.warmup, c.eval_every, c.log_every = 0, 4, 20
  c.table.update(kinds=("cycle",), b=0.01, updates=5 if arg.tiny else 200)
  c.arms = tuple(
    (f"{name}-{rule}", f"table.method={name}", f"table.rule={rule}", f"table.rates={RATES}")
    for name in METHODS
    for rule in RULES
  )
  return config.shrink(c) if arg.tiny else c
