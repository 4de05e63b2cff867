"""Training speed and memory against length at 8,192 tokens a batch: lightning, tiled quadratic and softmax attention.

Reproduces in miniature table 1 of arXiv 2401.04658 (0.4B on two A100: TransNormerLLM with Lightning Attention-2 38,615
tokens a second a GPU at 1K and 38,596 at 92K, with Lightning Attention-1 41,789 and 6,012, LLaMA with FlashAttention-2
35,931 and 4,078). Each arm is a short training run; its steps but for the first, which compiles, are timed.
Cost: about 10 minutes on 2 CPU cores.

  python -m experiments.transnormer --config=experiments/transnormer/configs/lengths.py
"""

from experiments.transnormer.experiment import Config
from research import config

TOKENS = 8192
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
ATTENTIONS = {"lightning": "transnormer", "quadratic": "quadratic", "softmax": "transformer"}


def get_config(arg=None):
  arg = config.parse_arg(arg)
  c = config.defaults(Config)
  c.report = "lengths"
  c.steps, c.batch, c.length = 5, TOKENS // LENGTHS[-1], LENGTHS[-1]
  c.seeds = (0, 1, 2)
  lengths = (32, 64) if arg.tiny else LENGTHS
  tokens = 512 if arg.tiny else TOKENS
  c.arms = tuple(
    (f"{name}-{length}", f"architecture={architecture}", f"length={length}", f"batch={tokens // length}")
    for name, architecture in ATTENTIONS.items()
    for length in lengths
  )
  c.model.update(vocab=256, width=128, layers=2, heads=2, head_dim=64, glu_width=384, precision="float32")
  c.tx.update(lr=1e-3, warmup=2, schedule="constant")
  c.log_every, c.eval_every, c.eval_batches = 1, 0, 1
  return config.shrink(c) if arg.tiny else c
