"""WikiText-103 at 45M parameters: TransNormerLLM against the transformer of the zoo, three seeds each.

The setting of table 1 of arXiv 2405.18371: validation / test perplexity 23.46 / 24.03 (45.45M parameters) against the
transformer's 24.40 / 24.78 (44.65M). 6 layers of width 512 and a tied vocabulary of GPT-2's size give these counts
(ours 45.40M and 45.46M). The paper refers for the recipe to an earlier one ("TNN setting") and does not give it: rows
of 512, batches of 65,536 tokens, 50k updates, 5e-4 and weight decay 0.2 are what this config assumes, without dropout.

Data: the training split in text files (`files:DIR`), of which 5 % are held out, or prepared by TFDS
(`tfds:NAME?field=text`, which keeps the dataset's validation split; see docs/data.md), and GPT-2's tokenizer.json.
Compare with the paper's numbers the perplexities of the dataset's own splits, afterwards:

  python -m research.tools.evaluate --workdir=DIR --run=transnormer-0 --source=files:VALIDATION

Cost: a GPU or a few TPU chips; an arm and seed is 9e17 FLOPs, about 2 hours on one H100 at 15 % of peak.

  python -m experiments.transnormer --config=experiments/transnormer/configs/wikitext103.py \
    --config.data.source=files:TRAIN --config.data.tokenizer=hf:PATH/tokenizer.json
"""

from experiments.transnormer.experiment import Config
from research import config


def get_config(arg=None):
  arg = config.parse_arg(arg)
  c = config.defaults(Config)
  c.steps, c.batch, c.length = 50_000, 128, 512
  c.seeds = (0, 1, 2)
  c.arms = (("transformer", "architecture=transformer"), ("transnormer", "architecture=transnormer"))
  c.model.update(vocab=50_272, width=512, layers=6, heads=8, head_dim=64, glu_width=1280, precision="bfloat16")
  c.tx.update(lr=5e-4, warmup=4000, schedule="cosine", weight_decay=0.2)
  c.data.update(source=("files:wikitext-103/train",), tokenizer="hf:gpt2/tokenizer.json")
  c.eval_every = 1000
  c.checkpoint.update(every=1000, keep_last=2)
  if arg.tiny:
    c = config.shrink(c)
    c.data.update(source=("stdlib",), tokenizer="bytes")
  return c
