"""From images to a model that needs no guidance: a tokenizer, a model of its codes, and that model tuned.

Each stage is a task, and an arm of a command. Later ones find the arms before them, of the same seed, by
name: "tokenizer" makes the codes, "classifier" and "judge" measure samples.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import importlib
from typing import Any

import jax
from jax import P
from jax import numpy as jnp
import numpy as np

from experiments.cca import classifier, code_shards, evaluation, tuning
from experiments.cca.classifier import Classifier
from research import data, flops, optim, tokenizer_training
from research.data import images
from research.data.text import SPLITS
from research.errors import UserError, check
from research.fit import Experiment
from research.kernels.dispatch import place
from research.mesh import BATCH, batch_shard, to_devices
from research.metrics import Mean
from research.models import transformer, var
from research.models.llamagen import LlamaGen
from research.models.var import VAR
from research.models.vq import VQ
from research.models.vqvae import VQVAE
from research.nn.precision import POLICIES
from research.tokenizer_training import Trained

MODELS = {"llamagen": (LlamaGen, VQ), "var": (VAR, VQVAE)}


def tokenizer(cfg: Any) -> Experiment:
  """Trains the backbone's tokenizer on images."""
  _check_codes(cfg)
  make = MODELS[cfg.backbone][1]

  def init(key):
    keys = jax.random.split(key)
    adversary = None
    if cfg.reconstruction.adversarial:
      policy = POLICIES[cfg.tokenizer.precision]
      adversary = tokenizer_training.PatchDiscriminator(keys[1], policy, cfg.data.channels)
    return Trained(make(keys[0], cfg.tokenizer, cfg.mesh.partition), adversary)

  loss = functools.partial(tokenizer_training.loss, weights=cfg.reconstruction, features=_maps(cfg))
  step = functools.partial(tokenizer_training.train_step, revival=cfg.revival)
  return _on_images(cfg, init, loss, train_step=step)


def _maps(cfg: Any) -> Callable | None:
  """The feature network of the perceptual term."""
  weight, name = cfg.reconstruction.perceptual, cfg.features
  if not weight:
    return None
  module, _, function = name.partition(":")
  try:
    return getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError):
    fix = f"reconstruction.perceptual={weight:g} needs a function images -> maps as module:function; docs/tokenizers.md"
    raise UserError("features", name or "''", fix) from None


def classify(cfg: Any) -> Experiment:
  """Trains a classifier on images, for `evaluation`."""
  cfg.classifier.check_image(cfg.data.size)

  def init(key):
    return Classifier(key, cfg.classifier, cfg.data.size, cfg.data.channels, cfg.model.classes)

  return _on_images(cfg, init, classifier.loss)


def model(cfg: Any) -> Experiment:
  """Trains the backbone on the codes of images, with labels dropped."""

  def loss(model, batch, key):
    codes, labels, weights = (place(batch[k], P(BATCH)) for k in ("codes", "labels", "weights"))
    log_p = model.log_likelihood(model(batch.get("inputs", codes), labels, key), codes)
    return {"loss": Mean(-jnp.sum(weights * log_p), jnp.sum(weights) * codes.shape[1])}

  return _on_codes(cfg, loss, 1.0)


def tune(cfg: Any) -> Experiment:
  """Tunes the model that `init_from` names by one of the losses of `tuning`."""
  loss = functools.partial(tuning.loss, cfg=cfg.tune)
  fakes = cfg.tune.method == "ddo"
  fix = "ddo's negatives are drawn from the model that it starts from; use arm:NAME"
  check(not fakes or cfg.init_from.startswith("arm:"), "init_from", cfg.init_from or "''", fix)
  # forward and backward of pairs, and forward of pairs by the reference; gft: of rows, and forward without a class
  cost = 2 + 2 / 3 if cfg.tune.has_reference else 4 / 3
  exp = _on_codes(cfg, loss, cost, reference=cfg.tune.has_reference, fakes=fakes)

  def check_start(model, reference):
    tuning.self_check(model, to_devices(next(iter(exp.data("train")))), reference, cfg=cfg.tune)

  return dataclasses.replace(exp, check_start=check_start)


TASKS = {"tokenizer": tokenizer, "classifier": classify, "model": model, "tune": tune}


def _on_images(cfg: Any, init: Callable, loss: Callable, **parts: Any) -> Experiment:
  """What is trained on images float32 [batch, size, size, channels] in [-1, 1], labels and weights."""
  picture = (cfg.batch, cfg.data.size, cfg.data.size, cfg.data.channels)
  row = {
    name: jax.ShapeDtypeStruct((cfg.batch,), dtype) for name, dtype in (("labels", "int32"), ("weights", "float32"))
  }
  batch = {"images": jax.ShapeDtypeStruct(picture, jnp.float32), **row}
  found = functools.cache(functools.partial(load, cfg))

  def rows(split):
    return _batches(cfg, found().splits[split], split, functools.partial(evaluation.signed, cfg.data))

  forward = lambda key: loss(init(key), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch), key)["loss"].total
  once = flops.products(forward, jax.eval_shape(lambda: jax.random.key(0)))
  return Experiment(
    init=init,
    loss=loss,
    data=rows,
    batch=lambda: batch,
    tx=optim.make(cfg.tx, cfg.steps),
    flops_per_token={"products": 3 * once / (cfg.batch * cfg.length)},
    info=lambda: found().info(),
    **parts,
  )


def _on_codes(cfg: Any, loss: Callable, cost: float, reference: bool = False, fakes: bool = False) -> Experiment:
  """What is trained on codes: those that the arm "tokenizer" makes of the images, once, before the first step.

  cost: FLOPs of a step, of those of its rows' likelihood.
  """
  _check_codes(cfg)
  mesh = dict(jax.sharding.get_abstract_mesh().shape)
  cfg.model.check_mesh(mesh, cfg.mesh.partition)
  per_token = (
    transformer.flops_per_token(cfg.model, cfg.length) if cfg.backbone == "llamagen" else var.flops_per_token(cfg.model)
  )
  found, made = functools.cache(functools.partial(load, cfg)), {}
  shapes = tuning.batch_shapes(cfg.tune, cfg.model, cfg.batch)

  def prepare(sibling):
    count = jax.process_count()
    check(count == 1, "num_processes", count, "codes and samples of other arms' models are made by one process alone")
    made["sibling"] = sibling

  @functools.cache
  def coded():
    book = str(made["sibling"]("tokenizer"))
    parts = [evaluation.codes(book, cfg.data)]
    if fakes:
      start = str(made["sibling"](cfg.init_from.removeprefix("arm:")))
      parts.append(evaluation.fakes(start, book, cfg.data, cfg.seed))
    for rows in parts[0].values():
      tuning.check_data(rows["codes"], rows["labels"], cfg.model)
    return {split: {name: x for part in parts for name, x in part[split].items()} for split in SPLITS}

  def rows(split):
    kept = {name: coded()[split][name] for name in shapes}
    return _batches(cfg, Rows(kept), split)

  measured = {"samples": evaluation.measure, "likelihood": evaluation.likelihood}
  evals = {name: lambda model, f=f: f(model, made["sibling"], cfg) for name, f in measured.items()}
  make = MODELS[cfg.backbone][0]
  exp = Experiment(
    init=lambda key: make(key, cfg.model, cfg.mesh.partition),
    loss=loss,
    data=rows,
    batch=lambda: shapes,
    tx=optim.make(cfg.tx, cfg.steps),
    evals=evals if cfg.evaluation.samples else {},
    flops_per_token={name: cost * x for name, x in per_token.items()},
    info=lambda: found().info(),
    reference=reference,
    prepare=prepare,
  )
  return code_shards.feed(exp, cfg, _batches) if cfg.codes.source else exp


class Rows:
  """Arrays of one length as random access to rows."""

  def __init__(self, arrays: Mapping[str, np.ndarray]):
    self.arrays = arrays

  def __len__(self) -> int:
    return len(next(iter(self.arrays.values())))

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    return {name: x[i] for name, x in self.arrays.items()}

  def __repr__(self) -> str:
    return f"Rows({', '.join(self.arrays)})"


class Whole:
  """The rows of `source` that fill whole batches: what fills up the last one would count as images."""

  def __init__(self, source: Any, batch: int):
    self.source, self.length = source, len(source) // batch * batch

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    return self.source[i]

  def __repr__(self) -> str:
    return f"Whole({self.source!r}, {self.length})"


def load(cfg: Any) -> images.ImageData:
  """The images of `cfg`. Raises UserError where they are not such as the models speak of."""
  try:
    found = images.load(cfg.data)
  except UserError as e:
    raise e.under("data") from None
  classes = len(found.classes)
  check(classes == cfg.model.classes, f"{cfg.backbone}.classes", cfg.model.classes, f"{cfg.data.source} has {classes}")
  rows = len(found.splits["validation"])
  check(
    rows >= cfg.batch, "batch", cfg.batch, f"{cfg.data.source} has {rows} images for validation; use at most as many"
  )
  return found


def _batches(cfg: Any, source: Any, split: str, prepare: Callable | None = None) -> Any:
  train, shard = split == "train", batch_shard(jax.sharding.get_mesh())
  rows = source if train else Whole(source, cfg.batch)
  return data.batches(rows, cfg.batch, seed=cfg.seed, shard=shard, train=train, prepare=prepare)


def _check_codes(cfg: Any) -> None:
  """Raises UserError unless images, codes and model fit together."""
  ours, book = cfg.model, cfg.tokenizer
  name, other = ("llamagen", "vq") if cfg.backbone == "llamagen" else ("var", "vqvae")
  check(
    cfg.data.channels == book.image_channels,
    f"{other}.image_channels",
    book.image_channels,
    f"data has {cfg.data.channels}",
  )
  side = cfg.data.size
  check(
    side % book.downsample == 0,
    "data.size",
    side,
    f"must be a multiple of {book.downsample}: {other}.mult halves so often",
  )
  check(book.vocab == ours.vocab, f"{other}.vocab", book.vocab, f"must be {name}.vocab, {ours.vocab}")
  if name == "var":
    for field in ("code_width", "scales"):
      theirs, mine = getattr(book, field), getattr(ours, field)
      check(theirs == mine, f"vqvae.{field}", theirs, f"must be var.{field}, {mine}")
  grid = side // book.downsample
  last = ours.scales[-1] if name == "var" else ours.rope_grid
  fix = f"must be {last} x {last}, as the model's tokens; change data.size, {other}.mult or the model"
  check(grid == last, "codes", f"{grid} x {grid}", fix)
  check(cfg.length == ours.tokens, "length", cfg.length, f"must be the tokens of an image, {ours.tokens}")
