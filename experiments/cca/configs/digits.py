"""The paper's story on 1,797 digits of 8 x 8: tokenizer, model, one epoch of alignment, guidance-free samples.

Everything is trained by this one command, stage after stage: a tokenizer with a grid of 4 x 4 codes, two classifiers
(one measures samples, the other judges their classes), LlamaGen with labels dropped, and from it one epoch
each of CCA over lambda and beta, of CCA that keeps guidance, DPO, unlearning, NCA, GFT and DDO.
Cost: about 14 minutes of processor time, on 2 CPU cores.

  python -m experiments.cca --config=experiments/cca/configs/digits.py
"""

from experiments.cca.experiment import Config
from research import config

BETA = 0.1  # the paper's 0.02 x 576 tokens / 16 would be 0.7
LAMBDAS = (0.1, 0.3, 1.0, 3.0, 10.0)
BETAS = (0.02, 0.5)
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
FEW = (0.0, 0.25, 0.5, 1.0)
EPOCH = 65  # steps of 20 of the 1,300 training images


def number(x):
  """As part of an arm's name."""
  return f"{x:g}".replace(".", "_")


def get_config(arg=None):
  arg = config.parse_arg(arg)
  c = config.defaults(Config)
  c.report = "digits"
  c.seeds, c.length, c.batch, c.steps = (0, 1, 2), 16, 20, EPOCH
  c.log_every, c.eval_every, c.checkpoint.every = 10, 0, 200
  c.vq.update(vocab=64, code_width=8, latent=32, channels=32, mult=(1, 1), blocks=1, image_channels=1)
  c.llamagen.update(
    vocab=64, classes=10, tokens=16, layers=3, width=96, heads=4, kv_heads=4, head_dim=24, mlp_width=256
  )
  c.llamagen.update(precision="float32", token_dropout=0.3, residual_dropout=0.2, mlp_dropout=0.2)  # images are few
  c.evaluation.samples = 490
  c.tune.beta = BETA
  c.tx.update(lr=3e-4, warmup=5, schedule="constant", b2=0.95, weight_decay=0.05)
  c.arms = arms(arg.tiny)
  if not arg.tiny:
    return c
  c = config.shrink(c)
  c.data.size, c.vq.mult, c.classifier.channels = 4, (1,), (8,)
  c.evaluation.update(samples=20, timed=20)
  c.llamagen.update(layers=1, width=32, heads=2, kv_heads=2, head_dim=16, mlp_width=64)
  return c


def arms(tiny=False, steps=1000):
  """(name, overrides) of every stage, of the model with so many steps; tiny: as long as the config says."""

  def stage(name, task, steps, lr, *more):
    size = () if tiny else (f"steps={steps}", "batch=64", f"tx.lr={lr}", "tx.schedule=cosine", "tx.warmup=20")
    return (name, f"task={task}", *size, *more)

  scales = lambda xs: "evaluation.scales=" + ",".join(f"{x:g}" for x in ((xs[0], xs[-1]) if tiny else xs))
  tune = lambda name, *more: (name, "task=tune", "init_from=arm:model", *more)
  cca = lambda lam, beta: tune(f"cca-{number(lam)}-{number(beta)}", f"tune.lam={lam}", f"tune.beta={beta}")
  other = ("classifier.channels=" + ("8,8" if tiny else "24,48,48"), "classifier.features=32")
  return (
    stage("tokenizer", "tokenizer", 400, 2e-3),
    stage("classifier", "classifier", 300, 2e-3),
    stage("judge", "classifier", 300, 2e-3, *other),
    stage("model", "model", steps, 1e-3, "tx.weight_decay=0.5", scales(SCALES)),
    tune("dpo", "tune.method=dpo"),
    tune("unlearning", "tune.method=unlearning", "tune.lam=0.5"),
    tune("nca", "tune.method=nca"),
    tune("gft", "tune.method=gft", "tune.beta=0.5"),
    tune("ddo", "tune.method=ddo"),
    tune("cca_cfg", "tune.lam=1", "tune.beta=1", scales(FEW)),
    *(cca(1.0, beta) for beta in BETAS),
    *(cca(lam, BETA) for lam in LAMBDAS),
  )
