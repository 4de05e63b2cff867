"""Codes that `research.tools.codes` has written, as what `stages` trains on: for sets of images of any size."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from research import image_tokenizers
from research import mesh as meshes
from research.data import codes
from research.data.codes import Codes, pick
from research.errors import UserError, check
from research.fit import Experiment
from research.models.vqvae import VQVAE


def feed(exp: Experiment, cfg: Any, batches: Callable) -> Experiment:
  """`exp` on the codes of `cfg.codes`.

  batches: (cfg, source, split, prepare) -> the batches of a source. What is wrong with the codes, or is not what
  the model speaks of, is told when the run asks for `info`.
  """
  fix = "its negatives are drawn for images in memory; use another method with codes.source"
  check(cfg.task != "tune" or cfg.tune.method != "ddo", "tune.method", cfg.tune.method, fix)
  fix = "samples are measured beside images in memory; use 0, and research.tools.sample"
  check(cfg.evaluation.samples == 0, "evaluation.samples", cfg.evaluation.samples, fix)

  @functools.cache
  def info():
    try:
      about = codes.manifest(cfg.codes.source)
    except UserError as e:
      raise e.under("codes") from None
    _check(about, cfg)
    fix = "name the model to tune: a published .pt or .safetensors file, or a workdir"
    starts = cfg.task != "tune" or cfg.init_from or cfg.resume
    check(bool(starts), "init_from", "''", fix)
    if cfg.backbone == "var":
      _tokenizer(cfg.codes, tuple(cfg.model.scales), about["tokenizer"]["sha256"])
    return codes.info(cfg.codes.source)

  def rows(split):
    source = Codes(cfg.codes.source, split)
    found = batches(cfg, source, split, pick)
    if cfg.backbone == "llamagen":
      return found
    sha256 = codes.manifest(cfg.codes.source)["tokenizer"]["sha256"]
    return found.map(functools.partial(_with_inputs, _tokenizer(cfg.codes, tuple(cfg.model.scales), sha256)))

  return dataclasses.replace(exp, data=rows, info=info, prepare=lambda sibling: None)


def _check(about: dict[str, Any], cfg: Any) -> None:
  """Raises UserError unless the codes of a manifest are such as the model writes."""
  source, model, book = cfg.codes.source, cfg.model, about["tokenizer"]
  kind = {"llamagen": "VQ", "var": "VQVAE"}[cfg.backbone]
  check(
    book["kind"] == kind,
    "codes.source",
    source,
    f"holds codes of a {book['kind']}; {cfg.backbone} has those of a {kind}",
  )
  theirs = {"vocab": book["vocab"], "tokens": about["tokens"], "classes": len(about["classes"])}
  ours = {name: getattr(model, name) for name in theirs}
  if kind == "VQVAE":
    theirs |= {name: book[name] for name in ("code_width", "scales")}
    ours |= {"code_width": model.code_width, "scales": list(model.scales)}
  for name, value in theirs.items():
    check(value == ours[name], f"{cfg.backbone}.{name}", ours[name], f"{source} was written with {value}")
  rows = about["splits"]["validation"]["images"]
  check(rows >= cfg.batch, "batch", cfg.batch, f"{source} has {rows} images for validation; use at most as many")


@functools.lru_cache(maxsize=1)
def _tokenizer(cfg: codes.CodesConfig, scales: tuple[int, ...], sha256: str) -> VQVAE:
  """The tokenizer of VAR, on a CPU: small work in float32, beside what the accelerators do."""
  check(cfg.tokenizer != "", "codes.tokenizer", "''", "VAR reads what its tokenizer makes of codes; name its weights")
  with jax.set_mesh(_host()):
    found = image_tokenizers.load(cfg.tokenizer, cfg.tokenizer_run or None, scales)
    same = image_tokenizers.identity(found)["sha256"]
  fix = f"is not the one that {cfg.source} was written with: its sha256 is {same[:12]}, not {sha256[:12]}"
  check(same == sha256, "codes.tokenizer", cfg.tokenizer, fix)
  return found


def _host() -> jax.sharding.Mesh:
  try:
    devices = jax.local_devices(backend="cpu")
  except RuntimeError:  # JAX_PLATFORMS names none
    devices = jax.local_devices()
  return meshes.make_mesh(meshes.MeshConfig(partition="replicated"), devices[:1])


def _with_inputs(tokenizer: VQVAE, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A batch with what VAR reads to write its codes."""
  with jax.set_mesh(_host()):
    return batch | {"inputs": np.asarray(jax.device_get(_inputs(tokenizer, batch["codes"])))}


@jax.jit
def _inputs(tokenizer, rows):
  return tokenizer.inputs(rows)
