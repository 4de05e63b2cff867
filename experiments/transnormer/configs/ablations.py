"""Ablations of TransNormerLLM: positions, decay temperature, gate, activations, norms, and the other rates of decay.

Reproduces in miniature tables 4 to 12 of arXiv 2405.18371 (385M parameters, 100k updates; losses there are in bits, as
2^loss is the perplexity, and so are ours). The last arm is not in the paper: equation 10's decays, where the released
code, and every other arm, has ALiBi's slopes.
Cost: about 10 minutes on 2 CPU cores.

  python -m experiments.transnormer --config=experiments/transnormer/configs/ablations.py
"""

from experiments.transnormer.experiment import Config
from research import config

ARMS = (
  ("base",),
  ("ape", "model.position=ape", "model.decay=none"),
  ("decay_only", "model.position=none"),
  ("lrpe_only", "model.position=lrpe_all", "model.decay=none"),
  ("lrpe_d", "model.position=lrpe_all"),
  ("no_temperature", "model.temperature=false"),
  ("no_gate", "model.gate=false"),
  ("no_activation", "model.activation=none"),
  ("1_plus_elu", "model.activation=1+elu"),
  ("glu_swish", "model.glu_activation=silu"),
  ("rms", "model.norm=rms"),
  ("layer", "model.norm=layer"),
  ("decay_paper", "model.decay=paper"),
)


def get_config(arg=None):
  arg = config.parse_arg(arg)
  c = config.defaults(Config)
  c.report = "ablations"
  c.steps, c.batch, c.length = 120, 16, 128
  c.seeds = (0, 1, 2)
  c.arms = ARMS
  c.model.update(vocab=256, width=96, layers=4, heads=4, head_dim=24, glu_width=256, precision="float32")
  c.tx.update(lr=6e-3, warmup=12, schedule="cosine")
  c.eval_every, c.eval_batches = 0, 32
  return config.shrink(c) if arg.tiny else c
