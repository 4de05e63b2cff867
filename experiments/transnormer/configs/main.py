"""Language modelling on the embedded corpus: TransNormerLLM against the transformer of the zoo, three seeds each.

Reproduces in miniature the comparison of arXiv 2307.14995 (loss of 385M parameters after 100k updates: transformer
2.362, TransNormerLLM 2.248 bits a token): equal parameters to within 1 %, the same data and order. Each has the best of
the learning rates 1.5e-3, 3e-3 and 6e-3, by one seed; `:rate=3e-3` gives both the same.
Cost: about 5 minutes on 2 CPU cores.

  python -m experiments.transnormer --config=experiments/transnormer/configs/main.py
"""

from experiments.transnormer.experiment import Config
from research import config

ARGS = ("rate=3e-3",)


def get_config(arg=None):
  arg = config.parse_arg(arg, rate=0.0)
  c = config.defaults(Config)
  c.steps, c.batch, c.length = 300, 16, 256
  c.seeds = (0, 1, 2)
  rates = {"transformer": arg.rate or 3e-3, "transnormer": arg.rate or 6e-3}
  c.arms = tuple((name, f"architecture={name}", f"tx.lr={rate}") for name, rate in rates.items())
  c.model.update(vocab=256, width=128, layers=2, heads=4, head_dim=32, glu_width=384, precision="float32")
  c.tx.update(warmup=30, schedule="cosine")
  c.eval_every, c.eval_batches = 50, 16
  c.checkpoint.every = 100
  return config.shrink(c) if arg.tiny else c
