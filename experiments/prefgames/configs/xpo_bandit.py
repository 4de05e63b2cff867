"""Exploration: comparisons until a policy is good, where the reference hardly ever plays the good response.

XPO's argument (arXiv 2405.21046): online DPO waits until the reference shows the good response, exp(1 / (8 b))
comparisons and more; a bonus for leaving what the reference shows does not wait. Exact argmin over a finite class, as
in the theorem, for online DPO (both pairings), XPO, and XPO with the bonus's sign turned; 1, 8 and 32 rare responses.
`:softmax` has a free softmax under gradient descent in the argmin's place, of which the theorem says nothing; its bonus
is ten times as large, as the smaller one hardly moves a logit.
Cost: about 1.5 minutes on 2 CPU cores, 2 with `:softmax`.

  python -m experiments.prefgames --config=experiments/prefgames/configs/xpo_bandit.py
"""

from experiments.prefgames.experiment import Config
from research import config

ARGS = ("softmax",)
ALGORITHMS = ("dpo_own", "dpo_reference", "xpo", "xpo_flipped")


def get_config(arg=None):
  arg = config.parse_arg(arg, softmax=False)
  c = config.defaults(Config)
  c.task, c.report = "bandit", "steps"
  c.steps, c.batch, c.seeds = 100, 32, (0, 1, 2)
  c.tx.warmup, c.eval_every, c.log_every = 0, 10, 20
  c.bandit.updates = 5 if arg.tiny else 40
  sizes = (1, 8, 32)
  if arg.softmax:
    sizes = (1, 4, 8)
    c.bandit.update(policies="softmax", alpha=0.1, updates=5 if arg.tiny else 20)
  c.arms = tuple(
    (f"{name}-{size}", f"bandit.algorithm={name}", f"bandit.size={size}") for size in sizes for name in ALGORITHMS
  )
  return config.shrink(c) if arg.tiny else c
