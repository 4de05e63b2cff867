"""Robustness: learning rates up to 1e-1, five seeds, and how the coefficients start, on text.

Reproduces in miniature figure 5 of arXiv 2411.19574 (learning rates 1e-4 to 1e-2, of which the last makes plain
attention diverge; 5 seeds). As it stands the learning rates; `:seeds` has five seeds of one rate; `:start` other starts
of the coefficients, which the paper does not try. Updates that are not finite are left out rather than stop the sweep.
Cost: about 5 minutes on 2 CPU cores, 3 with `:seeds`, 4 with `:start`.

  python -m experiments.kvshift --config=experiments/kvshift/configs/robustness.py
"""

from experiments.kvshift.experiment import Config
from research import config

ARGS = ("seeds", "start")
RATES = (1e-3, 1e-2, 1e-1)


def get_config(arg=None):
  arg = config.parse_arg(arg, seeds=False, start=False)
  c = config.defaults(Config)
  c.steps, c.batch, c.length = 120, 16, 128
  c.seeds = (0, 1, 2)
  if arg.start:
    c.report = "gaps"
    c.arms = tuple((name, f"attention={name}") for name in ("plain", "kvshift", "identity", "half", "previous"))
  elif arg.seeds:
    c.report, c.seeds = "gaps", (0, 1, 2, 3, 4)
    c.arms = (("plain", "attention=plain"), ("kvshift", "attention=kvshift"))
  else:
    c.report, c.sweep = "sweep", "tx.lr"
    c.arms = tuple(
      (f"{attention}-{i}", f"attention={attention}", f"tx.lr={rate}")
      for attention in ("plain", "kvshift")
      for i, rate in enumerate(RATES)
    )
  c.model.update(vocab=256, width=128, layers=2, heads=4, kv_heads=4, head_dim=32, mlp_width=384)
  c.model.update(rope_base=100_000.0, precision="float32")
  c.tx.update(lr=3e-3, warmup=12, schedule="constant")
  c.eval_every, c.eval_batches = 0, 32
  c.skip_nonfinite = c.steps
  return config.shrink(c) if arg.tiny else c
