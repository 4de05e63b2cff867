"""The learned coefficients: on text, which heads look at the previous token, and in which layers?

Reads trained models as table 4 of arXiv 2411.19574 does (there 2.9B parameters), beside the same heads at the start.
Cost: about 4 minutes on 2 CPU cores.

  python -m experiments.kvshift --config=experiments/kvshift/configs/learned.py
"""

from experiments.kvshift.experiment import Config
from research import config


def get_config(arg=None):
  arg = config.parse_arg(arg)
  c = config.defaults(Config)
  c.report = "learned"
  c.steps, c.batch, c.length = 300, 16, 256
  c.seeds = (0, 1, 2)
  c.arms = (("kvshift", "attention=kvshift"),)
  c.model.update(vocab=256, width=96, layers=6, heads=6, kv_heads=6, head_dim=16, mlp_width=256)
  c.model.update(rope_base=100_000.0, precision="float32")
  c.tx.update(lr=3e-3, warmup=30, schedule="cosine")
  c.eval_every, c.eval_batches = 100, 16
  return config.shrink(c) if arg.tiny else c
