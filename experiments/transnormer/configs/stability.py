"""Decoding by powers of the decay overflows, decoding by a decayed state does not; and training stays finite.

Reproduces the robust inference of arXiv 2307.14995: decay^t and decay^-t kept apart, which is equal on paper, against
S_t = decay S_{t-1} + k_t v_t^T, both in float32 beside float64, for a decay of 0.9 and those of the paper's first layer
(equation 10: down to e^-7). A small model with these very decays is trained beside it.
Cost: about 2 minutes on 2 CPU cores.

  python -m experiments.transnormer --config=experiments/transnormer/configs/stability.py
"""

from experiments.transnormer.experiment import Config
from research import config


def get_config(arg=None):
  arg = config.parse_arg(arg)
  c = config.defaults(Config)
  c.report = "stability"
  c.steps, c.batch, c.length = 60, 16, 256
  c.seeds = (0, 1, 2)
  c.model.update(vocab=256, width=128, layers=2, heads=8, head_dim=16, glu_width=384, precision="float32")
  c.model.decay = "paper"
  c.tx.update(lr=3e-3, warmup=6, schedule="cosine")
  c.eval_every, c.eval_batches = 20, 8
  return config.shrink(c) if arg.tiny else c
