"""n-grams: 200 random (x1, x2) -> x3 to be learnt by heart, at three sizes; the shift should neither help nor hurt.

Reproduces in miniature figure 3 of arXiv 2411.19574 (there 50M, 0.4M and 0.8K parameters).
Cost: about 3 minutes on 2 CPU cores.

  python -m experiments.kvshift --config=experiments/kvshift/configs/ngram.py
"""

from experiments.kvshift.experiment import Config
from research import config

SIZES = {"small": (1, 8), "middle": (2, 32), "large": (4, 64)}  # layers, width


def get_config(arg=None):
  arg = config.parse_arg(arg)
  c = config.defaults(Config)
  c.task, c.report, c.sweep = "ngram", "sweep", "params"
  c.steps, c.batch, c.length = 500, 32, 48
  c.seeds = (0, 1, 2)
  c.arms = tuple(
    (f"{attention}-{name}", f"attention={attention}", f"model.layers={layers}", f"model.width={width}",
     f"model.head_dim={width // 2}", f"model.mlp_width={3 * width}")
    for attention in ("plain", "kvshift")
    for name, (layers, width) in SIZES.items()
  )  # fmt: skip
  c.model.update(vocab=24, heads=2, kv_heads=2, rope_base=100_000.0, precision="float32")
  c.tx.update(lr=3e-3, warmup=50, schedule="cosine", weight_decay=0.0)
  c.eval_every = 100
  return config.shrink(c) if arg.tiny else c
