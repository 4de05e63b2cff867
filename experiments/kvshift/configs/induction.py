"""Induction: one layer with KV shifting against one and two plain layers; accuracy against steps.

Reproduces in miniature figure 1a of arXiv 2411.19574 (depth) on clean data, with the
loss taken where the answer can be known. Cost: about 6 minutes on 2 CPU cores.

  python -m experiments.kvshift --config=experiments/kvshift/configs/induction.py
"""

from experiments.kvshift.experiment import Config
from research import config


def get_config(arg=None):
  arg = config.parse_arg(arg)
  c = config.defaults(Config)
  c.task, c.report = "induction", "accuracy"
  c.steps, c.batch, c.length = 1000, 64, 64
  c.seeds = (0, 1, 2)
  c.arms = (
    ("plain-1", "attention=plain", "model.layers=1"),
    ("kvshift-1", "attention=kvshift", "model.layers=1"),
    ("plain-2", "attention=plain", "model.layers=2"),
  )
  c.model.update(vocab=64, width=64, heads=1, kv_heads=1, head_dim=64, mlp_width=192)
  c.model.update(rope_base=100_000.0, precision="float32")
  c.tx.update(lr=1e-3, warmup=50, schedule="constant", weight_decay=0.0)
  c.eval_every = 50
  return config.shrink(c) if arg.tiny else c
