"""The published sizes for pods: `:385m`, `:1b`, `:3b`, `:7b`, `:13b`, `:65b`, `:175b`, and `:15b` of the later release.

Layers, widths, heads and GLU widths of 385M to 13B (arXiv 2307.14995) are those whose parameters sum to the published
counts; 65B and 175B have published layers, widths and heads, and GLU widths of the same ratio, 2.6875, which nothing
verifies. 15B: 42 layers of width 5120, 40 heads and 14.83B parameters are published; a tied vocabulary of 100,280 and
the GLU width are what fits them. The paper's learning rate, batch and schedule are not known. Here they are those of a
later study by the same group (arXiv 2406.16690): batches of 4M tokens in rows of 8192, 3e-4 held constant, weight decay
0.1. Tokens: 1.0T (385M), 1.2T (1B) and 1.4T (7B) are the released models', 2.0T that of 15B, 1.4T a guess elsewhere.
Decays are the released code's; `--config.model.decay=paper` has equation 10's.

The arm `transformer` is the zoo's, with as many parameters. The data is private: write your own into shards with
`research.tools.tokenize`. 175B is meant for thousands of chips.
Cost: a pod. At 40 % of peak an arm of 385M is 5 days on 64 TPU v5e chips, of 7B 7 on 512 v5p, of 175B 23 on 4096.

  python -m experiments.transnormer --config=experiments/transnormer/configs/paper.py:7b --config.data.source=shards:DIR
"""

from experiments.transnormer.experiment import Config
from research import config

LENGTH, ROWS = 8192, 512
# layers, width, heads, glu_width, vocab, tokens, mesh.model
SIZES = {
  "385m": (24, 1024, 8, 2816, 50_272, 1.0e12, 1),
  "1b": (16, 2048, 16, 5632, 50_272, 1.2e12, 1),
  "3b": (32, 2560, 20, 6912, 50_272, 1.4e12, 4),
  "7b": (30, 4096, 32, 11_008, 50_272, 1.4e12, 4),
  "13b": (36, 5120, 40, 13_824, 50_272, 1.4e12, 4),
  "65b": (72, 8192, 64, 22_016, 50_272, 1.4e12, 8),
  "175b": (88, 12_288, 96, 33_024, 50_272, 1.4e12, 8),
  "15b": (42, 5120, 40, 13_664, 100_280, 2.0e12, 4),
}
ARGS = tuple(SIZES)
PODS = dict.fromkeys(SIZES, ("v5p:8x8x8",)) | {"175b": ("v5p:16x16x16",)}


def get_config(arg=None):
  arg = config.parse_arg(arg, **dict.fromkeys(SIZES, False))
  chosen = [name for name in SIZES if arg[name]] or ["385m"]
  layers, width, heads, glu_width, vocab, tokens, model = SIZES[chosen[-1]]
  c = config.defaults(Config)
  c.arms = (("transformer", "architecture=transformer"), ("transnormer", "architecture=transnormer"))
  c.batch, c.length = ROWS, LENGTH
  c.steps = round(tokens / (ROWS * LENGTH))
  c.model.update(vocab=vocab, width=width, layers=layers, heads=heads, head_dim=width // heads, glu_width=glu_width)
  c.model.update(precision="bfloat16", remat="full")
  c.tx.update(lr=3e-4, warmup=2000, schedule="constant", b1=0.9, b2=0.95, weight_decay=0.1)
  c.data.update(source=("shards:pretraining",), tokenizer="bpe", bpe_vocab=vocab)
  c.mesh.update(model=model, partition="fsdp_tp")
  c.eval_every, c.eval_batches = 1000, 8
  c.checkpoint.update(every=1000, keep_last=2, keep_every=10_000)
  if arg.tiny:
    c = config.shrink(c)
    c.data.update(source=("stdlib",), tokenizer="bytes")
  return c
