"""Multi-hop induction: accuracy by the number of hops, both attentions, at equal depth.

Reproduces in miniature figure 9 of arXiv 2411.19574 (there 5 layers and 16 hops, on the task of Sanford et al., 2024).
Cost: about 8 minutes on 2 CPU cores.

  python -m experiments.kvshift --config=experiments/kvshift/configs/hops.py
"""

from experiments.kvshift.experiment import Config
from research import config


def get_config(arg=None):
  arg = config.parse_arg(arg)
  c = config.defaults(Config)
  c.task, c.report = "hops", "groups"
  c.steps, c.batch, c.length = 1500, 64, 64
  c.seeds = (0, 1, 2)
  c.arms = (("plain", "attention=plain"), ("kvshift", "attention=kvshift"))
  c.model.update(vocab=12, width=64, layers=3, heads=2, kv_heads=2, head_dim=32, mlp_width=192)
  c.model.update(rope_base=100_000.0, precision="float32")
  c.tx.update(lr=2e-3, warmup=100, schedule="cosine", weight_decay=0.0)
  c.eval_every = 250
  return config.shrink(c) if arg.tiny else c
