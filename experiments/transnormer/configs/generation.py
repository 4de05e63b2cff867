"""Generation: time of a token and memory of the cache after 1k to 256k tokens, beside the transformer's at equal size.

arXiv 2307.14995 has 2819.6 tokens a second of 7B parameters on an A100 (512 tokens before them, up to 1024 more) where
LLaMA-7B has 537.8, and a state of one size. Here one row on a CPU; what is measured is the growth, not the ratio: XLA
transposes the keys and values of each layer for every token there, about three times the bytes that have to be read.
The transformer's cache is filled with zeros, not by a prefill: what a step costs does not depend on what it holds.
Both are trained for a few steps only, since what they say does not matter either.
Cost: about 3 minutes on 2 CPU cores and 5 GB of memory.

  python -m experiments.transnormer --config=experiments/transnormer/configs/generation.py
"""

from experiments.transnormer.experiment import Config
from research import config


def get_config(arg=None):
  arg = config.parse_arg(arg)
  c = config.defaults(Config)
  c.report = "generation"
  c.steps, c.batch, c.length = 10, 8, 1024
  c.seeds = (0, 1, 2)
  c.arms = (("transformer", "architecture=transformer"), ("transnormer", "architecture=transnormer"))
  c.model.update(vocab=256, width=192, layers=4, heads=4, head_dim=48, glu_width=512, precision="float32")
  c.tx.update(warmup=5)
  c.eval_every, c.eval_batches = 0, 1
  return config.shrink(c) if arg.tiny else c
