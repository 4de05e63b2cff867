"""As digits.py with next-scale prediction: a multi-scale tokenizer with grids of 1, 2 and 4 codes a side, and VAR.

VAR is stopped after 250 updates, while guidance still helps: at 400 its samples are as near to held-out images without
it, at 1,000 as near as the tokenizer allows.
Cost: about 14 minutes on 2 CPU cores.

  python -m experiments.cca --config=experiments/cca/configs/digits_var.py
"""

from experiments.cca.configs import digits
from research import config

SCALES = (1, 2, 4)


def get_config(arg=None):
  arg = config.parse_arg(arg)
  c = digits.get_config(arg.tiny and "tiny")
  c.backbone, c.length, c.arms = "var", 21, digits.arms(arg.tiny, steps=250)
  c.vqvae.update(vocab=64, code_width=8, latent=32, channels=32, mult=(1, 1), blocks=1, image_channels=1)
  c.vqvae.update(scales=SCALES, phis=2)
  c.var.update(vocab=64, code_width=8, classes=10, scales=SCALES, layers=3, width=96, heads=4, mlp_width=384)
  c.var.precision = "float32"
  if arg.tiny:
    c.vqvae.mult = (1,)
    c.var.update(layers=1, width=32, heads=2, mlp_width=64)
  return c
