"""Codes of images, samples of models, and what other models of the same command make of them.

The real images, their codes and the features of two classifiers are made once for all arms of a seed.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from research import image_generation, image_tokenizers, runs
from research.data import images
from research.data.text import SPLITS
from research.errors import check
from research.evals import image_likelihood
from research.evals import images as measures
from research.mesh import to_devices
from research.models.llamagen import LlamaGen
from research.models.vqvae import VQVAE

_ROWS = 128  # at a time


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """Samples of a trained model, measured at the run's last step.

  samples: for each scale, as many of each class as of any other; 0: none. scales: of guidance, in the convention of the
  papers on it: 0 is none. timed: images drawn at once where sampling is timed. Raises UserError.
  """

  samples: int = 0
  scales: tuple[float, ...] = (0.0,)
  timed: int = 2000

  def __post_init__(self):
    check(self.samples >= 0, "samples", self.samples, "use 0 (none) or a positive number")
    good = len(self.scales) >= 1 and min(self.scales) >= 0
    check(good, "scales", self.scales, "give some, none below 0 (no guidance)")
    check(self.timed >= 1, "timed", self.timed, "use at least 1")


def signed(cfg: images.ImageConfig, row: Mapping[str, np.ndarray], rng: np.random.Generator | None) -> dict:
  """A row of `images.Images` as models read it: cut out, float32 in [-1, 1]."""
  row = images.augment(cfg, row, rng)
  return row | {"images": (row["images"] / 127.5 - 1).astype(np.float32)}


@functools.lru_cache(maxsize=2)
def real(cfg: images.ImageConfig) -> dict[str, dict[str, np.ndarray]]:
  """{split: images float32 [n, size, size, channels], labels and weights}, all of them."""
  out = {}
  for split, source in images.load(cfg).splits.items():
    rows = [signed(cfg, source[i], None) for i in range(len(source))]
    out[split] = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  return out


def codes(tokenizer: str, cfg: images.ImageConfig) -> dict[str, dict[str, np.ndarray]]:
  """{split: codes int32 [n, tokens], labels and weights}; for VAR also inputs, which it reads to write them.

  tokenizer: the directory of the checkpoints of the arm that trained it.
  """
  return _codes(tokenizer, cfg, jax.sharding.get_mesh())


def fakes(model: str, tokenizer: str, cfg: images.ImageConfig, seed: int) -> dict[str, dict[str, np.ndarray]]:
  """{split: codes that a model draws for the labels of its images, and for VAR inputs}: beside the rows of `codes`."""
  of, book = real(cfg), trained(tokenizer).tokenizer
  labels = np.concatenate([of[split]["labels"] for split in SPLITS])  # together: one program
  made = {"fakes": draw(trained(model), book, labels, 0.0, seed)}
  if isinstance(book, VQVAE):
    made["fake_inputs"] = in_parts(_inputs, book, made["fakes"])
  cut = len(of[SPLITS[0]]["labels"])
  return {
    split: {name: x[part] for name, x in made.items()}
    for split, part in zip(SPLITS, (slice(cut), slice(cut, None)), strict=True)
  }


def draw(model: Any, tokenizer: Any, labels: np.ndarray, scale: float, seed: int) -> np.ndarray:
  """Codes int32 [n, tokens] of a model for `labels`, under guidance of a scale."""
  if isinstance(model, LlamaGen):
    return image_generation.llamagen_tokens(model, labels, guidance=1 + scale, seed=seed)
  return image_generation.var_tokens(model, tokenizer, labels, guidance=scale, seed=seed)


def decoded(tokenizer: Any, codes: np.ndarray) -> np.ndarray:
  """Codes int32 [n, tokens] -> images float32 NHWC in [-1, 1]."""
  return in_parts(image_tokenizers.decode, tokenizer, codes)


def recoded(tokenizer: Any, x: np.ndarray) -> np.ndarray:
  """Images float32 NHWC in [-1, 1], encoded and decoded."""
  return decoded(tokenizer, in_parts(image_tokenizers.encode, tokenizer, x))


def asked(cfg: Any, n: int) -> np.ndarray:
  """int32 [n]: classes to ask for, each as often as the others."""
  return (np.arange(n) % cfg.model.classes).astype(np.int32)


def measure(model: Any, sibling: Callable[[str], Any], cfg: Any) -> dict[str, float]:
  """`<scale>/<measure>` of samples at each scale, and of real images: `floor`, `ceiling`, and `codes`, those that were
  encoded and decoded again.

  sibling: see `Experiment.prepare`.
  """
  how = cfg.evaluation
  arms = [str(sibling(name)) for name in ("tokenizer", "classifier", "judge")]
  known = _known(*arms, cfg.data, jax.sharding.get_mesh())
  labels = asked(cfg, how.samples)
  made = {f"{s:g}": draw(model, known.tokenizer, labels, s, cfg.seed) for s in how.scales}
  drawn = {name: decoded(known.tokenizer, x) for name, x in made.items()}
  sets = {name: (x, labels) for name, x in drawn.items()} | {"codes": known.coded}
  features, found = {}, {}
  for name, (x, of) in sets.items():
    features[name], log_probs = in_parts(_opinion, known.classifier, x)
    fidelity = measures.fidelity(in_parts(_opinion, known.judge, x)[1], of)
    found[name] = {"class_score": measures.class_score(log_probs), "diversity": measures.diversity(flat(x), of)}
    found[name] |= {f"judge_{k}": v for k, v in fidelity.items()}
  first = next(iter(drawn))
  found[first] |= measures.copies(*(flat(known.real[split]["images"]) for split in SPLITS), flat(drawn[first]))
  compared = measures.compare(*known.features, features)
  return {f"{name}/{k}": v for name in compared for k, v in (compared[name] | found.get(name, {})).items()}


def likelihood(model: Any, sibling: Callable[[str], Any], cfg: Any) -> dict[str, float]:
  """`image_likelihood.measures` of the held-out images; rewards are over the arm that `init_from` names."""
  arms = (str(sibling("tokenizer")), cfg.data)
  start = str(sibling(cfg.init_from.removeprefix("arm:"))) if cfg.init_from.startswith("arm:") else None
  before = None if start is None else _log_p(start, *arms, jax.sharding.get_mesh())
  labels = real(cfg.data)["validation"]["labels"]
  return image_likelihood.measures(_of_every_class(model, *arms), labels, cfg.model.tokens, before)


def _of_every_class(model, tokenizer, cfg):
  book = trained(tokenizer).tokenizer
  of = codes(tokenizer, cfg)["validation"]["codes"]
  return image_likelihood.of_every_class(model, of, tokenizer=book if isinstance(book, VQVAE) else None)


@functools.lru_cache(maxsize=2)
def _log_p(model: str, tokenizer: str, cfg: images.ImageConfig, mesh: Any) -> np.ndarray:
  return _of_every_class(trained(model), tokenizer, cfg)


@dataclasses.dataclass(frozen=True)
class Known:
  """What all arms of a seed are measured with.

  features: of training images, held-out ones, and these with their pixels in random places. coded: images and labels of
  training images that the tokenizer has encoded and decoded.
  """

  tokenizer: Any
  classifier: Any
  judge: Any
  real: dict[str, dict[str, np.ndarray]]
  features: tuple[np.ndarray, ...]
  coded: tuple[np.ndarray, np.ndarray]


@functools.lru_cache(maxsize=2)
def _known(tokenizer: str, classifier: str, judge: str, cfg: images.ImageConfig, mesh: Any) -> Known:
  of, seen = real(cfg), trained(classifier)
  held_out = of["validation"]["images"]
  pixels = np.random.default_rng(0).permuted(held_out.reshape(len(held_out), -1), axis=1).reshape(held_out.shape)
  features = tuple(in_parts(_opinion, seen, x)[0] for x in (of["train"]["images"], held_out, pixels))
  n, book = len(held_out), trained(tokenizer).tokenizer
  coded = decoded(book, codes(tokenizer, cfg)["train"]["codes"][:n])
  return Known(book, seen, trained(judge), of, features, (coded, of["train"]["labels"][:n]))


def trained(directory: str) -> Any:
  """The model of an arm whose checkpoints are in `directory`, on the current mesh."""
  return _trained(directory, jax.sharding.get_mesh())


@functools.lru_cache(maxsize=4)
def _trained(directory: str, mesh: Any) -> Any:
  workdir, _, run = directory.rstrip("/").rsplit("/", 2)
  return runs.load(workdir, run)[1]


@functools.lru_cache(maxsize=2)
def _codes(tokenizer: str, cfg: images.ImageConfig, mesh: Any) -> dict[str, dict[str, np.ndarray]]:
  out, model = {}, trained(tokenizer).tokenizer
  for split, rows in real(cfg).items():
    found = in_parts(image_tokenizers.encode, model, rows["images"])
    out[split] = {"codes": found, "labels": rows["labels"], "weights": rows["weights"]}
    if isinstance(model, VQVAE):
      out[split]["inputs"] = in_parts(_inputs, model, found)
  return out


def in_parts(f: Callable, model: Any, x: np.ndarray) -> Any:
  """`f(model, rows)` of all rows of x, so many at a time that one program will do."""
  parts = []
  for start in range(0, len(x), _ROWS):
    rows = x[start : start + _ROWS]
    filled = np.concatenate([rows, np.repeat(rows[:1], _ROWS - len(rows), axis=0)])
    made = jax.device_get(jax.block_until_ready(f(model, to_devices({"x": filled})["x"])))
    kept = len(rows)
    parts.append(jax.tree.map(lambda y, kept=kept: y[:kept], made))
  return jax.tree.map(lambda *y: np.concatenate(y), *parts)


def flat(x: np.ndarray) -> np.ndarray:
  """[n, ...] -> [n, numbers]."""
  return x.reshape(len(x), -1)


@jax.jit
def _inputs(tokenizer, x):
  return tokenizer.inputs(x)


@jax.jit
def _opinion(classifier, x):
  features = classifier.features(x)
  return features, classifier.log_probs(features)
