"""Induction: one layer with KV shifting against one, two and four plain layers; accuracy against steps.

Reproduces in miniature figure 1 of arXiv 2411.19574. As it stands: depth, on clean data, with the loss taken where the
answer can be known. `:generator=paper`: the paper's own generator, which contradicts itself later in a row; the loss is
taken everywhere and the first repetition scored. `:width`: width down to 8, two plain layers, one with the shift.
Cost: about 8 minutes on 2 CPU cores, as much with `:generator=paper`, 8 with `:width`.

  python -m experiments.kvshift --config=experiments/kvshift/configs/induction.py
"""

from experiments.kvshift.experiment import Config
from research import config

ARGS = ("generator=paper", "width")
WIDTHS = (8, 16, 32, 64)


def get_config(arg=None):
  arg = config.parse_arg(arg, generator="clean", width=False)
  c = config.defaults(Config)
  c.task, c.report = "induction", "accuracy"
  c.induction.generator = arg.generator
  c.steps, c.batch, c.length = 800, 64, 64
  c.seeds = (0, 1, 2)
  if arg.width:
    c.report, c.sweep = "sweep", "model.width"
    size = lambda w: (f"model.width={w}", f"model.head_dim={w}", f"model.mlp_width={3 * w}")
    c.arms = tuple(
      (f"{attention}-{w}", f"attention={attention}", f"model.layers={layers}", *size(w))
      for attention, layers in (("plain", 2), ("kvshift", 1))
      for w in WIDTHS
    )
  else:
    c.arms = (
      ("plain-1", "attention=plain", "model.layers=1"),
      ("plain-2", "attention=plain", "model.layers=2"),
      ("plain-4", "attention=plain", "model.layers=4"),
      ("kvshift-1", "attention=kvshift", "model.layers=1"),
    )
  c.model.update(vocab=64, width=64, heads=1, kv_heads=1, head_dim=64, mlp_width=192)
  c.model.update(rope_base=100_000.0, precision="float32")
  c.tx.update(lr=1e-3, warmup=50, schedule="constant", weight_decay=0.0)
  c.eval_every = 50
  if arg.generator == "paper":
    c.steps, c.induction.keys = 1000, c.length
    c.arms = tuple(arm for arm in c.arms if arm[0] != "plain-4")
  return config.shrink(c) if arg.tiny else c
