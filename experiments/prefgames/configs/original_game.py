"""The game without KL terms: what the last policy and the average one come to.

Multiplicative weights in self-play (SPO, arXiv 2401.04056; SPPO, arXiv 2405.00675) cycle, and their average converges;
optimism (ONPO, arXiv 2502.16852) and a magnet that moves (magnetic PO, arXiv 2410.16714) converge themselves; INPO
(arXiv 2407.00617) converges to the equilibrium at tau, whose bias is at most 2 tau max log 1/r. Cycles of five
responses, where a uniform reference would be the equilibrium and show nothing, and random games.
Cost: about 1 minute on 2 CPU cores.

  python -m experiments.prefgames --config=experiments/prefgames/configs/original_game.py
"""

from experiments.prefgames.experiment import Config
from research import config

TAUS = (("tau1e-1", 0.1), ("tau3e-2", 0.03), ("tau1e-2", 0.01))


def get_config(arg=None):
  arg = config.parse_arg(arg)
  c = config.defaults(Config)
  c.report = "original"
  c.steps, c.batch, c.length, c.seeds = 200, 64, 5, (0, 1, 2)
  c.tx.warmup, c.eval_every, c.log_every = 0, 3, 20
  c.table.update(kinds=("cycle", "uniform"), b=0.1, rates=(0.1,), updates=5 if arg.tiny else 100)
  c.arms = tuple((name, f"table.method={name}") for name in ("sppo", "onpo", "mpo"))
  c.arms += tuple((f"inpo-{name}", "table.method=inpo", f"table.b={tau}") for name, tau in TAUS)
  return config.shrink(c) if arg.tiny else c
