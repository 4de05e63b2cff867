"""Ablations and peers of KV shifting on the main config's text, at equal parameters but for a few coefficients.

Reproduces in miniature figure 8 and appendix J of arXiv 2411.19574 (gate, 0 to 1, keys only, values only, windows of 3
and 4, QKV), and adds what the paper does not compare with: a short depthwise convolution of keys and values, Canon-B.
Cost: about 8 minutes on 2 CPU cores.

  python -m experiments.kvshift --config=experiments/kvshift/configs/variants.py
"""

from experiments.kvshift.experiment import Config
from research import config

ARMS = ("plain", "kvshift", "gate", "clip", "konly", "vonly", "window3", "window4", "qkv", "conv", "canon")


def get_config(arg=None):
  arg = config.parse_arg(arg)
  c = config.defaults(Config)
  c.report = "gaps"
  c.steps, c.batch, c.length = 120, 16, 128
  c.seeds = (0, 1, 2)
  c.arms = tuple((name, f"attention={name}") for name in ARMS)
  c.model.update(vocab=256, width=128, layers=2, heads=4, kv_heads=4, head_dim=32, mlp_width=384)
  c.model.update(rope_base=100_000.0, precision="float32")
  c.tx.update(lr=3e-3, warmup=12, schedule="cosine")
  c.eval_every, c.eval_batches = 0, 32
  return config.shrink(c) if arg.tiny else c
