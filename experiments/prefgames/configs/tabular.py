"""Tables: how fast every method closes the duality gap, and in how many games it fails.

EGPO's own tables (arXiv 2503.08942; `simulations/` of its public code): 10 responses, independent uniform preferences,
references of normal logits, a policy that starts at its reference. The official step sizes and numbers of updates, as
eta = 4 lr / (b n); 32 games a seed where the paper draws one, and as many transitive ones, where nobody should fail.
`:sampled` estimates every update from 100 samples (b = 0.01, the official step and 100,000 updates, 10 games a seed);
`:sweep` tries seven step sizes a method; `:certificate` follows EGPO's KL(equilibrium || policy) update by update.
Cost: about 1.5 minutes on 2 CPU cores; `:sweep` about 3, `:certificate` half a minute, `:sampled` about 12.

  python -m experiments.prefgames --config=experiments/prefgames/configs/tabular.py
"""

from experiments.prefgames.experiment import Config
from research import config

ARGS = ("sampled", "sweep", "certificate")
METHODS = (
  "online_ipo_uniform",
  "online_ipo_policy",
  "nash_md",
  "nash_md_decay",
  "nash_md_pg",
  "mmd",
  "optimistic",
  "egpo",
)
# b and the step sizes at which EGPO's contraction is followed: 1, 3, 6 and 12 times 1 / (b + 3)
RATES = (("b1", 1.0, "0.25,0.75,1.5,3"), ("b1e-1", 0.1, "0.32,0.97,1.94,3.87"), ("b1e-2", 0.01, "0.33,1,2,4"))
SWEPT = "0.05,0.1,0.2,0.4,0.8,1.6,3.2"
SETTINGS = {"b1e-1": (0.1, 0.4, 10), "b1e-2": (0.01, 0.8, 50), "b1e-3": (0.001, 0.08, 1000)}  # b, eta, updates a step


def get_config(arg=None):
  arg = config.parse_arg(arg, sampled=False, sweep=False, certificate=False)
  c = config.defaults(Config)
  c.steps, c.batch, c.length, c.seeds = 100, 64, 10, (0, 1, 2)
  c.tx.warmup, c.eval_every, c.log_every = 0, 4, 20
  c.table.kinds = ("uniform", "transitive")
  most = 5 if arg.tiny else 200 if arg.sweep else 10**9
  if arg.sampled:
    c.x64, c.eval_every, c.batch = False, 5, 10
    c.table.update(kinds=("uniform",), b=0.01, rates=(0.008,), updates=min(1000, most), samples=100)
    c.arms = tuple((name, *method(name)) for name in METHODS if name not in ("nash_md_decay", "mmd"))
  elif arg.certificate:
    c.report = "contraction"
    c.table.update(method="egpo", kinds=("uniform",), updates=1)
    c.eval_every, c.log_every = 4, 1
    c.arms = tuple((name, f"table.b={b}", f"table.rates={rates}") for name, b, rates in RATES)
  else:
    c.arms = tuple(
      (
        f"{name}-{at}",
        *method(name),
        f"table.b={b}",
        f"table.rates={SWEPT if arg.sweep else eta}",
        f"table.updates={min(updates, most)}",
      )
      for at, (b, eta, updates) in SETTINGS.items()
      for name in METHODS
    )
  if arg.sweep:
    c.report, c.eval_every, c.skip_nonfinite = "sweep", 0, c.steps
  return config.shrink(c) if arg.tiny else c


def method(name):
  base = name.removesuffix("_decay")
  return (f"table.method={base}", *(["table.decay=true"] if base != name else []))
