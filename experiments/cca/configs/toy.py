"""Where the losses lead when nothing is sampled: tables of p(x|c) with every expectation a sum.

Checks theorem 3.1 of arXiv 2410.09347: at lambda = Z(c)^beta the model becomes p(x|c) (p(x|c)/p(x))^(1/beta), here
with beta = 1/2; other lambdas, the other losses, and the treatment of colliding labels beside it.
Cost: about 3 minutes on 2 CPU cores.

  python -m experiments.cca --config=experiments/cca/configs/toy.py
"""

from experiments.cca.experiment import Config
from research import config

LAMBDAS = (0.25, 0.5, 1.0, 2.0, 4.0, 16.0)


def get_config(arg=None):
  arg = config.parse_arg(arg)
  c = config.defaults(Config)
  c.task, c.report, c.x64 = "toy", "toy", True
  c.steps, c.batch, c.length = 1500, 8, 2
  c.seeds = (0, 1, 2)
  cca = tuple((f"cca-{lam:g}".replace(".", "_"), "toy.method=cca", f"toy.lam={lam}") for lam in LAMBDAS)
  c.arms = (
    ("cca", "toy.method=cca"),
    ("collisions", "toy.method=cca", "toy.collisions=true"),
    ("gft", "toy.method=gft"),
    ("ddo", "toy.method=ddo", "toy.beta=1"),
    ("dpo", "toy.method=dpo"),
    ("nca", "toy.method=nca"),
    ("unlearning", "toy.method=unlearning", "toy.lam=0.02"),
    *cca,
  )
  c.toy.beta = 0.5
  c.tx.update(lr=0.05, warmup=0, schedule="cosine", final=0.0, weight_decay=0.0, clip=0.0, b2=0.999)
  c.log_every, c.eval_every = 100, 300
  return config.shrink(c) if arg.tiny else c
