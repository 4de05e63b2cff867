"""The whole pipeline on text: sft, a judge, eight methods against it, and a tournament on held-out prompts.

Without an argument a model of 0.3M parameters on the embedded dataset, whose preferences go in circles
(`research/data/styles.py`). `:1b5` and `:2b` have EGPO's published hyperparameters (arXiv 2503.08942 and its public
code): b = 0.1, AdamW at 5e-7 after 1000 steps of warm-up, weight decay 0.01, clipping at 1, batches of 64, log-probs
divided by length for squared losses, a mixture of 0.125, the judge at 1e-5 with weight decay 0.1; XPO's bonus is 1e-5.
Not as published: no LoRA (rank 256 there) but all parameters; the judge starts from the sft model, not from Gemma-2-2B;
the sft's learning rate and all numbers of steps (the code counts epochs of prompts) are ours, as is XPO's memory.
`:1b5` has the shape of Qwen2.5-1.5B and `:2b` that of Gemma-2-2B; the zoo has neither the former's biases of queries,
keys and values nor the latter's soft caps, windows, second norms and GELU, so these are Llamas of those sizes: their
weights cannot be read, a Llama's can. Set `model` to fit `init_from`; a table says what differs.
Cost: about half an hour on 2 busy CPU cores for three seeds; `:1b5` and `:2b` a pod, days.

  python -m experiments.prefgames --config=experiments/prefgames/configs/text.py
  python -m experiments.prefgames --config=experiments/prefgames/configs/text.py:1b5 --config.init_from=DIR \
    --config.data.source=files:PAIRS.jsonl --config.data.tokenizer=hf:DIR/tokenizer.json --config.data.stop=151645
"""

from experiments.prefgames.experiment import Config
from research import config

SQUARED = ("egpo", "online_ipo_uniform", "online_ipo_policy", "nash_md")
OTHERS = ("nash_md_pg", "online_dpo", "xpo", "sppo")
# layers, width, heads, kv_heads, head_dim, mlp_width, vocab, rope_base, stop, mesh.model
SIZES = {
  "1b5": (28, 1536, 12, 2, 128, 8960, 151_936, 1e6, 151_645, 2),
  "2b": (26, 2304, 8, 4, 256, 9216, 256_000, 1e4, 107, 4),
}
ARGS = tuple(SIZES)
PODS = dict.fromkeys(SIZES, ("v5p:4x4x4",))
PLANNED = "egpo"


def get_config(arg=None):
  arg = config.parse_arg(arg, **dict.fromkeys(SIZES, False))
  chosen = [name for name in SIZES if arg[name]]
  c = config.defaults(Config)
  c.task, c.report, c.x64 = "text", "text", False
  c.tx.update(schedule="constant", weight_decay=0.01)
  (large if chosen else small)(c, *SIZES.get(chosen[-1] if chosen else "", ()))
  if arg.tiny:
    c = config.shrink(c)
    c.data.update(source="styles", tokenizer="bytes", stop=255, prompt_tokens=12, response_tokens=20)
    c.length = 32
    c.text.update(prompts=8, responses=2)
    short = ("steps=", "tx.warmup=", "eval_every=")
    c.arms = tuple((n, *(o for o in rest if n == "tournament" or not o.startswith(short))) for n, *rest in c.arms)
  c.text.online.tokens = c.data.response_tokens
  return c


def small(c):
  c.batch, c.length, c.eval_batches = 32, 36, 4
  c.model.update(vocab=256, width=96, layers=3, heads=4, kv_heads=2, head_dim=24, mlp_width=256, precision="float32")
  c.tx.update(lr=1e-4, warmup=10)  # at 3e-4 the policies end 8 nats from the sft model, and win no more often
  c.steps, c.eval_every, c.log_every, c.seeds = 60, 20, 20, (0, 1, 2)
  c.text.update(prompts=100, responses=4)
  c.arms = arms(("steps=160", "tx.lr=2e-3", "eval_every=80"), ("steps=240", "tx.lr=1e-3", "eval_every=80"), 20, 20)


def large(c, layers, width, heads, kv_heads, head_dim, mlp_width, vocab, rope_base, stop, model):
  c.batch, c.length, c.eval_batches = 64, 1024, 2
  c.model.update(layers=layers, width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim, mlp_width=mlp_width)
  c.model.update(
    vocab=vocab, rope_base=rope_base, norm_eps=1e-6, tie_embeddings=True, precision="bfloat16", remat="full"
  )
  c.data.update(source="files:preferences", tokenizer="hf:tokenizer.json", stop=stop)
  c.data.update(prompt_tokens=512, response_tokens=512)
  c.mesh.update(model=model, partition="fsdp_tp")
  c.tx.update(lr=5e-7, warmup=1000, b2=0.999, clip=1.0)
  c.steps, c.eval_every, c.log_every = 10_000, 1000, 10
  c.checkpoint.update(every=1000, keep_last=2)
  sft = ("steps=3000", "tx.lr=1e-5", "tx.warmup=100")
  c.arms = arms(sft, ("steps=9000", "tx.lr=1e-5", "tx.warmup=100", "tx.weight_decay=0.1"), 256, 3300)


def arms(sft, judge, memory, refresh):
  more = {"xpo": (f"text.online.memory={memory}",), "sppo": (f"text.online.refresh={refresh}",)}
  more |= dict.fromkeys(SQUARED, ("text.online.reduce=mean",))
  start = ("text.stage=online", "init_from=arm:sft")
  players = ",".join(("sft", *SQUARED, *OTHERS))
  return (
    ("sft", "text.stage=sft", *sft),
    ("judge", "text.stage=judge", "init_from=arm:sft", *judge),
    *((name, *start, f"text.online.method={name}", *more.get(name, ())) for name in (*SQUARED, *OTHERS)),
    (
      "tournament",
      "text.stage=tournament",
      "init_from=arm:judge",
      f"text.players={players}",
      "steps=1",
      "tx.warmup=0",
      "eval_every=0",
    ),
  )
