"""The paper's pre-training runs, plain and with the shift, for pods: `:1.5b`, `:2.9b`, `:6.7b`, `:13b`, `:19b`.

Sizes, context, vocabulary, tokens and optimiser are those of arXiv 2411.19574, tables 1 and 6 (learning rate constant
after its warm-up, AdamW 0.9 / 0.95, weight decay 0.1, rotary base 100,000). Its data is private ("a large amount from
FineWeb-edu"): write your own into shards with `research.tools.tokenize`.

The paper contradicts itself; table 6 is followed here. Warm-up: the text says 1,000 steps for all sizes, the table 600
(2.9B) and 3,000 (19B). Tokens a step: text and table say 1M, 16M, 1M, 2M and 3M; the caption of figure 6 says 0.5M for
1.5B and 6.7B and 1M for 13B. The 19B model has 256 rows a step here, not the table's 240, for meshes of powers of two:
3 * 2^20 tokens exactly.

Cost: a pod. At 40 % of peak the 1.5B pair is about 10 hours on 64 TPU v5e chips, the 2.9B pair 5 days on 256 v5p.

  python -m experiments.kvshift --config=experiments/kvshift/configs/paper.py:2.9b --config.data.source=shards:DIR
"""

from experiments.kvshift.experiment import Config
from research import config

# width, layers, heads, kv_heads, hidden, length, tokens, vocab, rows a step, learning rate, warm-up
SIZES = {
  "1.5b": (2048, 28, 16, 16, 5504, 2048, 10e9, 36_000, 64 * 8, 2e-4, 1000),
  "2.9b": (2560, 32, 20, 4, 8704, 4096, 500e9, 48_000, 512 * 8, 8e-4, 600),
  "6.7b": (4096, 32, 32, 32, 11008, 2048, 10e9, 36_000, 64 * 8, 2e-4, 1000),
  "13b": (5120, 40, 40, 40, 13824, 2048, 10e9, 36_000, 128 * 8, 2e-4, 1000),
  "19b": (6144, 48, 48, 4, 16384, 12288, 200e9, 48_000, 256, 2e-4, 3000),
}
ARGS = tuple(SIZES)
PODS = ("v5e:16x16", "v6e:16x16", "v5p:8x8x8", "v5p:16x16x16", "h100:8")


def get_config(arg=None):
  arg = config.parse_arg(arg, **dict.fromkeys(SIZES, False))
  chosen = [name for name in SIZES if arg[name]] or ["1.5b"]
  width, layers, heads, kv_heads, hidden, length, tokens, vocab, rows, lr, warmup = SIZES[chosen[-1]]
  c = config.defaults(Config)
  c.arms = (("plain", "attention=plain"), ("kvshift", "attention=kvshift"))
  c.batch, c.length = rows, length
  c.steps = round(tokens / (rows * length))
  c.model.update(vocab=vocab, width=width, layers=layers, heads=heads, kv_heads=kv_heads)
  c.model.update(head_dim=width // heads, mlp_width=hidden, rope_base=100_000.0, precision="bfloat16", remat="full")
  c.tx.update(lr=lr, warmup=warmup, schedule="constant", b1=0.9, b2=0.95, weight_decay=0.1)
  c.data.update(source=("shards:fineweb-edu",), tokenizer="bpe", bpe_vocab=vocab)
  c.mesh.update(model=4, partition="fsdp_tp")
  c.eval_every, c.eval_batches = 500, 8
  c.checkpoint.update(every=500, keep_last=2, keep_every=5000)
  if arg.tiny:
    c = config.shrink(c)
    c.data.update(source=("stdlib",), tokenizer="bytes")
  return c
