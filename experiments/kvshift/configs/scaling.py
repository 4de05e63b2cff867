"""Scaling on a CPU: validation loss against non-embedding parameters, four sizes, both attentions.

Reproduces in miniature figures 6 and 7a of arXiv 2411.19574 (there 1.5B to 13B parameters): equal tokens for all sizes.
Cost: about 8 minutes on 2 CPU cores.

  python -m experiments.kvshift --config=experiments/kvshift/configs/scaling.py
"""

from experiments.kvshift.experiment import Config
from research import config

SIZES = ((1, 32, 4e-3), (2, 48, 4e-3), (2, 96, 3e-3), (4, 128, 3e-3))  # layers, width, learning rate


def get_config(arg=None):
  arg = config.parse_arg(arg)
  c = config.defaults(Config)
  c.report, c.sweep = "sweep", "params"
  c.steps, c.batch, c.length = 200, 16, 128
  c.seeds = (0, 1, 2)
  c.arms = tuple(
    (f"{attention}-{layers}x{width}", f"attention={attention}", f"model.layers={layers}", f"model.width={width}",
     f"model.heads={width // 16}", f"model.kv_heads={width // 16}", f"model.mlp_width={3 * width}", f"tx.lr={lr}")
    for attention in ("plain", "kvshift")
    for layers, width, lr in SIZES
  )  # fmt: skip
  c.model.update(vocab=256, head_dim=16, rope_base=100_000.0, precision="float32")
  c.tx.update(warmup=20, schedule="cosine")
  c.eval_every, c.eval_batches = 0, 32
  return config.shrink(c) if arg.tiny else c
