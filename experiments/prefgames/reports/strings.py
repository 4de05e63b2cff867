"""Short strings: exact gaps against preferences asked for and against updates, and who beats whom in the end."""

import functools

import jax
from jax import numpy as jnp
import numpy as np

from experiments.prefgames import experiment, sequence
from experiments.prefgames.reports.common import by_arm, legend_below, matrix, method, spread
from experiments.prefgames.strings import all_strings
from research import paths, runs
from research import report as parts
from research.checkpoint import Checkpoints
from research.config import RunConfig
from research.fit import abstract_state, fresh_state
from research.mesh import on_devices
from research.preference.methods import METHODS
from research.preference.samplers import enumerated

FAILED = 0.5  # a seed whose gap ends above this share of the reference's has failed
REFERENCE = "reference"
_NAMES = {
  "online_dpo": "online DPO",
  "online_ipo_uniform": "online IPO, uniform pairs",
  "online_ipo_uniform-flat": "online IPO, flat pairs",
  "sppo": "SPPO",
}


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Three panels: gaps against queries and against updates, and the matrix of win rates."""
  gaps = parts.curves(workdir, "gap")
  arms = {arm: single for arm, single in by_arm(cfg).items() if arm in gaps}
  gaps = {arm: gaps[arm] for arm in arms}
  ends, starts = parts.final(gaps), {arm: {s: curve[0][1] for s, curve in by.items()} for arm, by in gaps.items()}
  last = {name: parts.final(parts.curves(workdir, name)) for name in ("original", "kl", "mixture_distance")}
  rates, names = tournament(workdir, arms, cfg)
  results, rows = {}, []
  for arm, single in arms.items():
    about = {"gap": ends[arm], **{name: by[arm] for name, by in last.items()}}
    # written so that NaN fails too
    about["failed"] = float(np.mean([not end <= FAILED * starts[arm][s] for s, end in ends[arm].items()]))
    about |= {"updates": single.steps * single.sequence.online.updates, "queries": single.steps * _asked(single)}
    against = dict(zip(ends[arm], rates[:, names.index(arm), names.index(REFERENCE)].tolist(), strict=True))
    results[arm] = about | {"wins_against_reference": against}
    cells = [spread(about[name]) for name in ("gap", "original", "kl")]
    rows.append([_label(arm), f"{about['updates']:,}", *cells, spread(against), f"{about['failed']:.2f}"])
  mean = rates.mean(0)
  table = {a: {b: float(mean[i, j]) for j, b in enumerate(names)} for i, a in enumerate(names)}
  start = {s: v for by in starts.values() for s, v in by.items()}
  shared = {"arms": results, "reference_gap": start, "win_rates": table, "failed_above": FAILED}
  parts.write_results(workdir, shared | {"cyclic": cfg.sequence.cyclic, "b": cfg.sequence.b})

  fig, axes = parts.figure(3)
  fig.set_size_inches(19, 6.8)
  asked = {a: {s: [(x * _asked(arms[a]), v) for x, v in c] for s, c in by.items()} for a, by in gaps.items()}
  updates = {
    a: {s: [(x * arms[a].sequence.online.updates, v) for x, v in c] for s, c in by.items()} for a, by in gaps.items()
  }
  for ax, curves, x in ((axes[0], asked, "preferences asked for"), (axes[1], updates, "updates")):
    parts.draw(ax, curves, _label)
    ax.axhline(FAILED * np.mean(list(start.values())), color="grey", linewidth=0.8, linestyle="--")
    ax.locator_params(axis="x", nbins=5)
    ax.set(yscale="log", xlabel=x, ylabel="duality gap, mean over prompts")
  axes[0].set_title("at equal queries", fontsize=10)
  axes[1].set_title("the same against updates", fontsize=10)
  matrix(fig, axes[2], mean, [_label(name) for name in names])
  axes[2].set_title("how often the row beats the column, %", fontsize=10)
  legend_below(fig, axes[0], 4)
  share = f"{100 * cfg.sequence.cyclic:.0f} % cyclic preference, b = {cfg.sequence.b:g}"
  responses = f"{cfg.model.vocab**cfg.length} responses to each of {cfg.sequence.prompts} prompts"
  fig.suptitle(f"{responses}, {share}; {parts.over_seeds(gaps)}; dashed: above it a seed has failed", fontsize=11)
  header = ["method", "updates", "gap (± SD)", "original gap", "KL to the reference", "beats the reference", "failed"]
  parts.finish(workdir, fig, "strings.png", parts.table(header, rows))


def tournament(workdir: paths.Path, arms: dict[str, RunConfig], cfg: RunConfig) -> tuple[np.ndarray, list[str]]:
  """(exact win rates [seeds, players, players] of the last policies and the reference, the players' names)."""
  names, rates = [REFERENCE, *arms], []
  with runs.mesh():
    for seed in cfg.seeds:
      first = next(iter(arms.values()))
      rows = sequence.draw(first.sequence, seed, first.model.vocab, first.length)
      strings = all_strings(first.model.vocab, first.length)
      by_token = functools.partial(enumerated, prompts=rows["prompts"], lengths=rows["lengths"], strings=strings)
      policy = jax.jit(lambda model, by_token=by_token: jnp.sum(by_token(model), axis=-1))
      exp = experiment.build(first)
      abstract = on_devices(abstract_state(exp))
      models = [fresh_state(exp, abstract, seed).model]
      for arm in arms:
        steps = Checkpoints(runs.checkpoint_dir(workdir, arm, seed))
        models.append(steps.restore({"model": abstract.model}, partial=True).state["model"])
      played = np.exp(np.stack([np.asarray(policy(model), np.float64) for model in models]))
      rates.append(
        np.einsum("api,pij,bpj->ab", played, sequence.preferences(rows, strings), played) / len(rows["lengths"])
      )
  return np.stack(rates), names


def _asked(single: RunConfig) -> int:
  """Preferences asked for in a step of the loop."""
  online = single.sequence.online
  return METHODS[online.method].queries * online.updates * single.batch


def _label(arm: str) -> str:
  name, _, flat = arm.partition("-")
  return _NAMES.get(arm) or method(name) + ", flat pairs" * bool(flat)
