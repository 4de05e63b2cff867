"""Online against offline preference learning under one loss, and which log-probabilities a step moves.

Golden win rate against KL to the reference (after arXiv 2405.08448) of IPO on pairs of the policy itself, which a
proxy labels; on recorded comparisons of the reference with itself, which the golden preference labelled and the proxy
was fitted to; and on all that the online run showed, shuffled. 64 strings of 3 tokens, all enumerated.
`:entanglement` has a pair a policy instead, whose strings differ in 1 to 12 of 12 tokens: do inner products of the
gradients of the two log-probabilities say which way a step moves them (arXiv 2410.13828)?
Cost: about 1 minute on 2 CPU cores, half of that with `:entanglement`.

  python -m experiments.prefgames --config=experiments/prefgames/configs/online_offline.py
"""

from experiments.prefgames.experiment import Config
from experiments.prefgames.online_offline import DATA
from research import config

ARGS = ("entanglement",)
DIFFER = (1, 2, 4, 12)
RATES = {"dpo": 0.04, "ipo": 0.0002, "normalised": 0.04}  # at b = 0.1 IPO's first gradient is 200 times DPO's


def get_config(arg=None):
  arg = config.parse_arg(arg, entanglement=False)
  c = config.defaults(Config)
  c.task, c.report = "strings", "goodhart"
  c.steps, c.batch, c.seeds = 100, 32, (0, 1, 2)
  c.tx.warmup, c.eval_every, c.log_every = 0, 4, 20
  c.strings.updates = 2 if arg.tiny else 10
  c.arms = tuple((name, f"strings.data={name}") for name in DATA)
  if arg.entanglement:
    c.task, c.report, c.batch = "pair", "entanglement", 256
    c.steps, c.eval_every = 50, 25
    c.pair.updates = 1 if arg.tiny else 10
    c.arms = tuple(
      (f"{loss}-{k}", f"pair.loss={loss}", f"pair.rate={rate}", f"pair.differ={k}")
      for loss, rate in RATES.items()
      for k in DIFFER
    )
  return config.shrink(c) if arg.tiny else c
