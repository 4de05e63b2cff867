"""Exploration, token by token: a combination lock of H bits, of which the reference plays each 1 with probability 0.1.

The string of zeros has reward 1/2, all others none, but the one of ones has 1. Under the reference that one comes once
in 10^H; a uniform player meets it once in 2^H. Exact argmin over the finite class "the lock opens with k", k any of
the 2^H strings, as in `xpo_bandit.py`, and a bonus ten times as large; `:tokens` has a free logit for every prefix
under gradient descent instead (with the larger bonus: the smaller one hardly moves a logit).
Cost: about 2 minutes on 2 CPU cores, and with `:tokens`.

  python -m experiments.prefgames --config=experiments/prefgames/configs/xpo_tree.py
"""

from experiments.prefgames.experiment import Config
from research import config

ARGS = ("tokens",)
ALGORITHMS = {  # what each overrides
  "dpo_own": ("bandit.algorithm=dpo_own",),
  "dpo_reference": ("bandit.algorithm=dpo_reference",),
  "xpo": ("bandit.algorithm=xpo",),
  "xpo_strong": ("bandit.algorithm=xpo", "bandit.alpha=0.1"),
  "uniform": ("bandit.algorithm=uniform",),
}


def get_config(arg=None):
  arg = config.parse_arg(arg, tokens=False)
  c = config.defaults(Config)
  c.task, c.report = "bandit", "steps"
  c.steps, c.batch, c.seeds = 100, 32, (0, 1, 2)
  c.tx.warmup, c.eval_every, c.log_every = 0, 10, 20
  c.bandit.update(kind="lock", bs=(0.015, 0.01), updates=5 if arg.tiny else 40)
  sizes = (2, 3, 4, 5, 6)
  if arg.tokens:
    c.bandit.update(policies="tokens", alpha=0.1, updates=5 if arg.tiny else 20)
    sizes = (2, 3, 4)
  c.arms = tuple(
    (f"{name}-{size}", *overrides, f"bandit.size={size}")
    for size in sizes
    for name, overrides in ALGORITHMS.items()
    if not (arg.tokens and name == "xpo_strong")  # all have that bonus
  )
  return config.shrink(c) if arg.tiny else c
