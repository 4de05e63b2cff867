"""Short strings: a small transformer and a preference in circles, at equal preference queries, with exact gaps.

4 ids, 3 places: 64 responses to each of 8 prompts, all enumerated for the evaluation, none for training. The reference
is the model as it starts, whose logits are about standard normal. Every method asks as many preferences a step of the
loop (EGPO 4 a row and update, own pairs 1). Uniform pairs are uniform; in the arms "-flat" they are what EGPO's code
has for language models, the policy at temperature 2 cut to its likeliest ids, here 2 of 4. XPO draws from the pairs of
its last 50 updates; SPPO's reference is its policy of at most 20 updates ago, its b is 1 / eta = 1. `:cyclic=0` is the
control, a Bradley-Terry preference; what lies between is a mixture.
Cost: about 6 minutes on 2 CPU cores, half of them to compile the eleven arms.

  python -m experiments.prefgames --config=experiments/prefgames/configs/sequence.py
"""

from experiments.prefgames.experiment import Config
from research import config
from research.preference.methods import METHODS

ARGS = ("cyclic=0",)
OWN = {  # what a method needs beside its name
  "xpo": ("sequence.online.memory=50", "sequence.online.alpha=1e-3"),
  "sppo": ("sequence.online.refresh=20", "sequence.online.b=1"),
}
ARMS = (
  "online_dpo",
  "xpo",
  "sppo",
  "online_ipo_policy",
  "nash_md_pg",
  "online_ipo_uniform-flat",
  "nash_md-flat",
  "egpo-flat",
  "online_ipo_uniform",
  "nash_md",
  "egpo",
)
QUERIES = 40  # of each row of the batch, in a step of the loop


def get_config(arg=None):
  arg = config.parse_arg(arg, cyclic=1.0)
  c = config.defaults(Config)
  c.task, c.report, c.x64 = "sequence", "strings", False
  c.steps, c.batch, c.length, c.seeds = 40, 128, 3, (0, 1, 2, 3, 4)
  c.eval_every, c.log_every = 4, 10
  c.model.update(vocab=4, width=32, layers=1, heads=2, kv_heads=2, head_dim=16, mlp_width=64, precision="float32")
  c.tx.update(lr=2e-3, warmup=0, weight_decay=0.0, schedule="cosine")
  c.sequence.cyclic = arg.cyclic
  c.sequence.online.update(b=c.sequence.b, pairs="uniform", top_k=2)
  c.arms = tuple((arm, *overrides(arm, 8 if arg.tiny else QUERIES)) for arm in (("xpo", "egpo") if arg.tiny else ARMS))
  return config.shrink(c) if arg.tiny else c


def overrides(arm, queries):
  name, _, pairs = arm.partition("-")
  return (
    f"sequence.online.method={name}",
    f"sequence.online.updates={max(queries // METHODS[name].queries, 1)}",
    *(["sequence.online.pairs=flat"] if pairs else []),
    *OWN.get(name, ()),
  )
