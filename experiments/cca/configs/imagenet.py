"""The paper's runs on ImageNet, from the released models: `:llamagen_b|l|xl|xxl|3b`, `:var_d16|d20|d24|d30`.

One epoch of CCA over 1,281,167 images, in batches of 256 (arXiv 2410.09347, appendix, and its commands); the arm
`cca_cfg` is the paper's setting for CCA with guidance, `--config.only=cca_cfg`. LlamaGen writes 24 x 24 codes of
384 pixels, VAR 680 of 256. Nothing is downloaded: the weights are files that you have, the codes made by our command:

  python -m research.tools.codes --source=tfds:imagenet2012 --tokenizer=vq_ds16_c2i.pt --size=384 --resize=1.1 \\
    --views=ten --out=CODES
  python -m research.tools.codes --source=tfds:imagenet2012 --tokenizer=vae_ch160v4096z32.pth --size=256 \\
    --resize=1.125 --views=five --out=CODES
  python -m experiments.cca --config=experiments/cca/configs/imagenet.py:llamagen_l \\
    --config.init_from=c2i_L_384.pt --config.codes.source=codes:CODES
  python -m experiments.cca --config=experiments/cca/configs/imagenet.py:var_d24 --config.init_from=var_d24.pth \\
    --config.codes.source=codes:CODES --config.codes.tokenizer=vae_ch160v4096z32.pth

Other than published: mismatched classes come from the whole batch, not from 2 to 8 rows of a device; bfloat16 where VAR
has float16; d30's weight decay stays 0.05 (there to 0.08); VAR's images in five crops, not any; gradients are means
over the batch (LlamaGen's script adds up micro-batches before it clips). `:tiny` trains a tokenizer of digits, and
tunes a model that is random.
Cost: a pod, see docs/pods.md; 4 forward passes and 2 backward an image.
"""

from experiments.cca.experiment import Config
from research import config
from research.models import llamagen, var
from research.models.vqvae import VQVAEConfig

STEPS = 1_281_167 // 256
# size, lambda, beta and lambda of the arm with guidance
LLAMAGEN = {
  "llamagen_b": ("B", 1000.0, 0.1, 1.0),
  "llamagen_l": ("L", 300.0, 0.02, 1.0),
  "llamagen_xl": ("XL", 1000.0, 0.1, 1.0),
  "llamagen_xxl": ("XXL", 1000.0, 0.1, 1.0),
  "llamagen_3b": ("3B", 500.0, 0.1, 1.0),
}
# size, lambda, whether dropout acts, the learning rate at the end as a share of the largest
VAR = {
  "var_d16": ("d16", 50.0, False, 0.1),
  "var_d20": ("d20", 50.0, True, 0.1),
  "var_d24": ("d24", 100.0, True, 0.01),
  "var_d30": ("d30", 1000.0, True, 0.01),
}
ARGS = (*LLAMAGEN, *VAR)
PODS = dict.fromkeys(ARGS, ("v5e:4x4",)) | dict.fromkeys(("llamagen_xxl", "llamagen_3b", "var_d30"), ("v5e:8x8",))


def get_config(arg=None):
  arg = config.parse_arg(arg, **dict.fromkeys(ARGS, False))
  name = next((name for name in ARGS if arg[name]), "llamagen_l")
  c = config.defaults(Config)
  c.task, c.report, c.backbone = "tune", "rewards", name.partition("_")[0]
  c.batch, c.steps = 256, STEPS
  c.tune.update(beta=0.02, uncond=0.1)
  c.tx.update(b1=0.9, b2=0.95, weight_decay=0.05)
  c.data.update(source="tfds:imagenet2012", channels=3)
  c.codes.source = "codes:imagenet"
  c.only = ("cca",)
  if name in LLAMAGEN:
    size, lam, beta, lam_cfg = LLAMAGEN[name]
    c.llamagen = config.as_configdict(llamagen.official(size, tokens=576, class_dropout=0.0, remat="full"))
    c.length, c.data.size, c.tune.dropout = 576, 384, True
    c.tx.update(lr=1e-5, schedule="constant", warmup=0, clip=1.0)
    c.arms = (("cca",), ("cca_cfg", f"tune.beta={beta}", f"tune.lam={lam_cfg}"))
  else:
    size, lam, c.tune.dropout, final = VAR[name]
    c.var = config.as_configdict(var.official(size, class_dropout=0.0, remat="full"))
    if not c.tune.dropout:
      c.var.drop_path = 0.0
    c.length, c.data.size = 680, 256
    # warm-up over 2 % of the epoch, constant to 5 %, then a straight line
    c.tx.update(lr=2e-5, schedule="wsd", warmup=round(0.02 * STEPS), decay=0.95, final=final, clip=2.0)
    c.arms = (("cca",),)
  c.tune.lam = lam
  c.mesh.partition = "fsdp"
  c.eval_every, c.eval_batches = 1000, 8
  c.checkpoint.every = 1000
  return tiny(c) if arg.tiny else c


def tiny(c):
  """A model of a few thousand numbers, and codes of 4 x 4 that an arm `tokenizer` makes of digits."""
  book = {"latent": 32, "channels": 32, "mult": (2, 1), "blocks": 1}
  c.vq.update(vocab=64, code_width=8, **book)
  c.llamagen.update(
    vocab=64, classes=10, tokens=16, layers=2, width=64, heads=4, kv_heads=4, head_dim=16, mlp_width=192
  )
  c.vqvae = config.as_configdict(VQVAEConfig(vocab=32, code_width=8, scales=(1, 2, 3, 4), **book | {"latent": 8}))
  c.var.update(vocab=32, code_width=8, classes=10, scales=(1, 2, 3, 4), width=48, layers=2, heads=3, mlp_width=192)
  c.length = 16 if c.backbone == "llamagen" else 30
  c.data.update(source="digits", size=8)
  c.codes.source, c.only = "", ()
  c.arms = (("tokenizer", "task=tokenizer"), ("cca",))
  return config.shrink(c)
