"""Language modelling on the embedded corpus: KV shifting against plain attention, three seeds each.

Reproduces in miniature the comparison of arXiv 2411.19574, section 4 (figure 6, table 2):
the same model, data, order and initial weights, with and without the shift.
Cost: about 5 minutes on 2 CPU cores.

  python -m experiments.kvshift --config=experiments/kvshift/configs/main.py
"""

from experiments.kvshift.experiment import Config
from research import config


def get_config(arg=None):
  arg = config.parse_arg(arg)
  c = config.defaults(Config)
  c.steps, c.batch, c.length = 300, 16, 256
  c.seeds = (0, 1, 2)
  c.arms = (("plain", "attention=plain"), ("kvshift", "attention=kvshift"))
  c.model.update(vocab=256, width=128, layers=2, heads=4, kv_heads=4, head_dim=32, mlp_width=384)
  c.model.update(rope_base=100_000.0, precision="float32")
  c.tx.update(lr=3e-3, warmup=30, schedule="cosine")
  c.eval_every, c.eval_batches = 50, 16
  c.checkpoint.every = 100
  return config.shrink(c) if arg.tiny else c
