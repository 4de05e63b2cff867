"""Fine-tuning a class-conditional model of images so that it needs no guidance, by one of six losses.

Condition contrastive alignment (Chen et al., 2024, arXiv 2410.09347) and what it is compared with. Rewards are
`log p_theta - log p_phi` of an image under a class, a sum over its tokens in nats; phi is the model that the run
started from.
"""

import dataclasses
from typing import Any, Literal

import jax
from jax import P
from jax import numpy as jnp
import numpy as np

from experiments.cca import losses
from experiments.cca.losses import LOSSES
from research.errors import check, check_range
from research.evals.image_likelihood import log_likelihoods
from research.kernels.dispatch import place, regroup_rows
from research.mesh import BATCH, row_spec
from research.metrics import Mean
from research.models import decoder
from research.models.llamagen import LlamaGenConfig
from research.models.var import VARConfig

METHODS = (*LOSSES, "gft", "ddo")
NATS = 1e-3  # a token, by which rewards may differ from 0 at the start: rounding, in programs compiled apart


@dataclasses.dataclass(frozen=True)
class TuningConfig:
  """Raises UserError.

  method: a loss of `losses`, or
    gft: guidance-free training (Chen et al., 2025, arXiv 2501.15420), the cross-entropy of
      beta logits(c) + (1 - beta) logits(null), the latter without gradient. beta is fixed: the paper's is drawn for
      each image and embedded beside the class, so that guidance can still be chosen when sampling.
    ddo: direct discriminative optimisation (Zheng et al., 2025, arXiv 2503.01103), cca with images that phi drew for
      the row's own class in the place of mismatched classes.
  beta: 1 / scale of the guidance aimed at (gft: 1 / (1 + scale)); it multiplies a sum over tokens.
  lam: weight of what is pushed away, in cca, unlearning and ddo.
  uncond: share of rows whose classes both become the null class, so that guidance stays possible.
  negatives: mismatched classes are those of the next rows of the (micro-)batch of all processes, or of the
    next ones in a random order; from either no image gets its own label by its place.
  collisions: pairs whose classes happen to be one count as positives, as published.
  masked: see `losses.rows`. Without a share of null classes the released code takes the other branch: False
    is then its VAR program; its LlamaGen program has unlearning there, by mistake.
  dropout: theta and phi each with masks of its own, as published; default neither. The first loss is then not
    known exactly. Labels are dropped by `uncond` alone: the model's class_dropout must be 0.
  """

  method: Literal[*METHODS] = "cca"
  beta: float = 0.02
  lam: float = 1.0
  uncond: float = 0.1
  negatives: Literal["roll", "permutation"] = "roll"
  collisions: bool = True
  masked: bool = True
  dropout: bool = False

  def __post_init__(self):
    check(self.beta > 0, "beta", self.beta, "must be positive")
    check(self.method != "gft" or self.beta < 1, "beta", self.beta, "gft needs one below 1")
    check(self.lam >= 0, "lam", self.lam, "use 0 or a positive number")
    check(0 <= self.uncond < 1, "uncond", self.uncond, "is a share of the rows: use 0 .. 1, e.g. 0.1")
    check(
      self.masked or self.uncond == 0, "masked", self.masked, f"is the branch of uncond=0, and that is {self.uncond}"
    )

  @property
  def has_reference(self) -> bool:
    """Whether the loss needs phi, or its log-likelihoods."""
    return self.method != "gft"


def batch_shapes(
  cfg: TuningConfig, model: LlamaGenConfig | VARConfig, rows: int, cached: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
  """What `loss` reads, for `Experiment.batch`; cached: with phi's log-likelihoods instead of phi."""
  codes, label = (rows, model.tokens), jax.ShapeDtypeStruct((rows,), jnp.int32)
  shapes = {"labels": label, "weights": jax.ShapeDtypeStruct((rows,), jnp.float32)}
  for name, reads in (("codes", "inputs"), ("fakes", "fake_inputs"))[: 1 + (cfg.method == "ddo")]:
    shapes[name] = jax.ShapeDtypeStruct(codes, jnp.int32)
    if isinstance(model, VARConfig):
      later = (rows, model.tokens - model.scales[0] ** 2, model.code_width)
      shapes[reads] = jax.ShapeDtypeStruct(later, jnp.float32)
  if cached:
    shapes["reference_log_probs"] = jax.ShapeDtypeStruct((rows, 2, 2), jnp.float32)
    if cfg.method != "ddo":
      shapes["others"] = label
  return shapes


def check_data(codes: np.ndarray, labels: np.ndarray, model: LlamaGenConfig | VARConfig) -> None:
  """Raises UserError unless codes [images, tokens] and labels [images] are such as `model` speaks of."""
  fix = f"the model writes {model.tokens} tokens an image; use the codes of its tokenizer"
  check(codes.ndim == 2 and codes.shape[1] == model.tokens, "codes", list(codes.shape), fix)
  check(labels.shape == codes.shape[:1], "labels", list(labels.shape), f"must be {len(codes)}, one an image")
  check_range("codes", codes, model.vocab)
  check_range("labels", labels, model.classes)


def fixed_pairs(labels: np.ndarray, seed: int) -> np.ndarray:
  """`others` for `loss`: a mismatched class int32 [images] for each image of a data set, drawn once for a whole run.

  That of the next image in a random order: no image gets its own by its place, and each label is used as often as it
  occurs.
  """
  order = np.random.default_rng(seed).permutation(len(labels))
  others = np.empty(len(labels), np.int32)
  others[order] = np.roll(labels[order], -1)
  return others


def reference_log_probs(
  reference: Any,
  codes: np.ndarray,
  labels: np.ndarray,
  others: np.ndarray | None = None,
  fakes: np.ndarray | None = None,
  **options: Any,
) -> np.ndarray:
  """What `loss` takes in the place of phi, float32 [images, 2, 2], for a whole data set whose pairs are fixed.

  others: see `fixed_pairs`; for ddo `fakes` int32 [images, tokens] in their place. options: see
  `research.evals.image_likelihood.log_likelihoods`. Three forwards an image (ddo: four), for all runs that start
  from this reference; each of their steps then spares two.
  """
  null = np.full_like(labels, reference.cfg.classes)
  if fakes is not None:
    pairs = [log_likelihoods(reference, x, np.stack([labels, null], 1), **options) for x in (codes, fakes)]
  else:
    log_p = log_likelihoods(reference, codes, np.stack([labels, others, null], 1), **options)
    pairs = [log_p[:, [0, 2]], log_p[:, [1, 2]]]
  return np.stack(pairs, axis=1).astype(np.float32)


def loss(
  model: Any, batch: dict[str, jax.Array], key: jax.Array | None, reference: Any = None, *, cfg: TuningConfig
) -> dict[str, Mean]:
  """The loss, a mean over rows (gft: over tokens), and what the model has learnt.

  batch: codes int32 [rows, tokens], labels int32 [rows], weights float32 [rows]; ddo: also fakes int32 [rows, tokens].
    For VAR also inputs (and fake_inputs), what it reads to write them: `VQVAE.inputs`.
    Optional: others int32 [rows], the mismatched classes; reference_log_probs float32 [rows, 2, 2] in the place
    of `reference`: of the two members of each pair, under their class and under the null class.
  Rows of weight 0 lend their labels to their neighbours: fill batches up with images, not with zeros.

  reward_pos, reward_neg: of images under their own and the other class (ddo: of fakes); reward_null: under the null
  class; margin, reward_accuracy: by how much, and how often, the first is above the second; drift: mean size of all;
  ce: cross-entropy in nats a token under the class. Raises UserError before anything is compiled.
  """
  drops = model.cfg.class_dropout
  check(not cfg.dropout or drops == 0, "model.class_dropout", drops, "use 0: the tuning's own uncond drops classes")
  reads_codes = isinstance(model.cfg, LlamaGenConfig)
  check(reads_codes or "inputs" in batch, "inputs", "absent", "VAR reads what VQVAE.inputs makes of the codes")
  null_key, order_key, *keys = [None] * 4 if key is None else jax.random.split(key, 4)
  labels, null = place(batch["labels"], P(None)), _null(null_key, cfg, len(batch["labels"]))
  null_class = model.cfg.classes
  if cfg.method == "gft":
    return _guidance_free(model, batch, jnp.where(null, null_class, labels), keys[0], cfg)
  if cfg.method == "ddo":
    labels, second = jnp.where(null, null_class, labels), ("fakes", "fake_inputs")
    others, same, differ = labels, jnp.zeros_like(null), ~null
  else:
    others, second = _others(batch, labels, order_key, cfg), ("codes", "inputs")
    labels, others, same = losses.negatives(labels, null, null_class, others)
    same, differ = same if cfg.collisions else null, labels != others
  codes, both = _pair(batch["codes"], batch[second[0]]), _pair(labels, others)
  reads = codes if reads_codes else _pair(batch["inputs"], batch[second[1]])
  null, same, differ = (place(x, P(BATCH)) for x in (null, same, differ))

  def score(model, key):
    return _split_pairs(model.log_likelihood(model(reads, both, key if cfg.dropout else None), codes))

  log_p = score(model, keys[0])
  if "reference_log_probs" in batch:
    log_phi = _cached(batch, null, cfg)
  else:
    _check_reference(model, reference)
    log_phi = score(reference, keys[1])
  gaps = log_p - jax.lax.stop_gradient(log_phi)
  ce = -log_p[:, 0] / codes.shape[1]
  return _means(gaps, ce, place(batch["weights"], P(BATCH)), null, same, differ, cfg)


def _means(gaps, ce, weights, null, same, differ, cfg):
  pos, neg = (jnp.squeeze(x, 1) for x in jnp.split(gaps, 2, axis=1))
  name = "cca" if cfg.method == "ddo" else cfg.method
  settings = {"beta": cfg.beta, "lam": cfg.lam, "masked": cfg.masked}
  mean = lambda x, where=True: Mean(jnp.sum(jnp.where(where, weights * x, 0)), jnp.sum(jnp.where(where, weights, 0)))
  return {
    "loss": mean(losses.rows(name, pos, neg, same, **settings)),
    "loss_at_start": mean(losses.at_start(name, same, **settings)),
    "reward_pos": mean(pos, ~null),
    "reward_neg": mean(neg, differ),
    "reward_null": mean(pos, null),
    "reward_accuracy": mean((pos > neg).astype(jnp.float32), differ),
    "margin": mean(pos - neg, differ),
    "drift": mean((jnp.abs(pos) + jnp.abs(neg)) / 2),
    "ce": mean(ce, ~null),
  }


def _null(key, cfg, rows):
  """bool [rows]: which lose their class."""
  if cfg.uncond == 0 or key is None:
    return place(jnp.zeros(rows, bool), P(None))
  return place(jax.random.bernoulli(key, cfg.uncond, (rows,)), P(None))


def _others(batch, labels, key, cfg):
  """The mismatched class of each row."""
  if "others" in batch:
    return place(batch["others"], P(None))
  fix = "an image alone has no other to take a class from; use 2 or more (a micro-batch has batch / accumulate)"
  check(len(labels) >= 2, "batch", len(labels), fix)
  shuffled = cfg.negatives == "permutation" and key is not None
  return losses.neighbours(labels, place(jax.random.permutation(key, len(labels)), P(None)) if shuffled else None)


def _cached(batch, null, cfg):
  check(not cfg.dropout, "dropout", cfg.dropout, "reference_log_probs are made without it; use false, or the reference")
  check(cfg.method == "ddo" or "others" in batch, "others", "absent", "reference_log_probs are of fixed pairs")
  cached = place(batch["reference_log_probs"], P(BATCH, None, None))
  return jnp.where(null[:, None], cached[..., 1], cached[..., 0])


def _guidance_free(model, batch, labels, key, cfg):
  """Cross-entropy of logits mixed with those under the null class."""
  weights, codes = place(batch["weights"], P(BATCH)), place(batch["codes"], P(BATCH, None))
  reads, key = batch.get("inputs", codes), key if cfg.dropout else None
  labels, sg = place(labels, P(BATCH)), jax.lax.stop_gradient
  x = model(reads, labels, key)
  null = model(reads, jnp.full_like(labels, model.cfg.classes), key)
  # one product with twice the width: the logits of neither are ever there
  x = jnp.concatenate([cfg.beta * x, (1 - cfg.beta) * sg(null)], axis=-1)
  weight, bias = model.head_weight(), getattr(model, "head_bias", None)
  weight = jnp.concatenate([weight, sg(weight)])
  if bias is not None:
    bias = cfg.beta * bias[...] + (1 - cfg.beta) * sg(bias[...])
  log_p = decoder.row_log_likelihood(x, weight, codes, bias)
  return {"loss": Mean(-jnp.sum(weights * log_p), jnp.sum(weights) * codes.shape[1])}


def _pair(a, b):
  """[rows, ...] twice -> [2 rows, ...], the two of a row beside each other: none changes device."""
  both = jnp.stack([place(a, row_spec(a.ndim)), place(b, row_spec(a.ndim))], axis=1)
  return regroup_rows(both, 2 * len(a), *a.shape[1:])


def _split_pairs(x):
  """[2 rows] -> [rows, 2]."""
  return regroup_rows(x, len(x) // 2, 2)


def _check_reference(model, reference):
  check(reference is not None, "reference", "absent", "give the model that the run starts from, or reference_log_probs")
  shapes = lambda tree: [(jax.tree_util.keystr(path), x.shape) for path, x in jax.tree.leaves_with_path(tree)]
  ours, theirs = shapes(model), shapes(reference)
  differ = next((f"{b} against {a}" for a, b in zip(ours, theirs, strict=False) if a != b), f"{len(theirs)} parameters")
  check(ours == theirs, "reference", differ, "is of another architecture; use the model that the run starts from")


_metrics = jax.jit(loss, static_argnames="cfg")


def self_check(model: Any, batch: dict[str, jax.Array], reference: Any = None, *, cfg: TuningConfig) -> None:
  """Raises UserError unless theta is phi on `batch`, so that the first loss is what it must be.

  For `Experiment.check_start`. Tried without dropout: with it nothing can be known exactly.
  """
  if cfg.has_reference:
    means = _metrics(model, batch, jax.random.key(0), reference, cfg=dataclasses.replace(cfg, dropout=False))
    means = jax.block_until_ready(means)
    check_start({name: float(mean.value) for name, mean in means.items()}, batch["codes"].shape[1])


def check_start(metrics: dict[str, float], tokens: int) -> None:
  """Raises UserError unless the metrics of `loss` are those of a model that is its own reference."""
  fix = (
    f"must start at {metrics['loss_at_start']:.6g}, and log-likelihoods under the model and its reference differ "
    f"by {metrics['drift']:.3g} nats; start both, and reference_log_probs, from one checkpoint, without dropout"
  )
  check(metrics["drift"] <= NATS * tokens, "loss", f"{metrics['loss']:.6g}", fix)
