"""A multi-scale tokenizer (VAR's) of your own images, or of the digits: docs/tokenizers.md.

Arguments: pixels (8, 32, 64 or 256) a side, channels (1 or 3), and how many classes the images have. With pixels=256 it
is the released tokenizer; how that was trained is unpublished, and the settings are a start.
Cost: about 3 minutes on 2 CPU cores as it stands, of 256 pixels days of an accelerator.

  python -m experiments.cca --config=experiments/cca/configs/tokenizer.py
"""

from experiments.cca.experiment import Config
from research import config
from research.errors import check
from research.models.var import VARConfig
from research.models.vqvae import VQVAEConfig

# pixels: the tokenizer, steps, batch
SIZES = {
  8: (VQVAEConfig(64, 8, latent=32, channels=32, mult=(1, 1), blocks=1, scales=(1, 2, 4), phis=2), 400, 64),
  32: (VQVAEConfig(512, 16, latent=32, channels=64, mult=(1, 2, 2), scales=(1, 2, 3, 4, 6, 8)), 20_000, 64),
  64: (VQVAEConfig(1024, 16, latent=32, channels=64, mult=(1, 2, 2, 4), scales=(1, 2, 3, 4, 6, 8)), 50_000, 64),
  256: (VQVAEConfig(), 200_000, 128),
}


def get_config(arg=None):
  arg = config.parse_arg(arg, pixels=8, channels=1, classes=10)
  check(arg.pixels in SIZES, "pixels", arg.pixels, f"choose from {', '.join(map(str, SIZES))}")
  book, steps, batch = SIZES[arg.pixels]
  c = config.defaults(Config)
  c.arms, c.report, c.backbone = (("tokenizer", "task=tokenizer"),), "digits", "var"
  c.data.update(size=arg.pixels, channels=arg.channels)
  c.vqvae = config.as_configdict(book)
  c.vqvae.image_channels = arg.channels
  # what a model of its codes has to agree in
  c.var = config.as_configdict(VARConfig(book.vocab, book.code_width, arg.classes, book.scales))
  c.steps, c.batch = steps, batch
  c.eval_every, c.checkpoint.every, c.log_every = steps // 10, steps // 10, steps // 40
  c.tx.update(lr=2e-3 if arg.pixels == 8 else 1e-4, warmup=20, schedule="cosine", b2=0.95, weight_decay=0.05)
  if arg.tiny:
    c = config.shrink(c)
    c.vqvae.update(channels=32, blocks=1)
  c.length = book.tokens
  return c
