"""The naive and the robust way to decode, against float64: where the first goes wrong, and that the second does not."""

import math
from typing import Any

import jax
import numpy as np

from experiments.transnormer import stability
from research import paths
from research import report as parts
from research.config import RunConfig
from research.kernels.lightning_attention import reference
from research.nn.linear_attention import decay_rates

LENGTH, WIDTH = 1024, 32
WRONG = 0.1  # of the mean output


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Errors by token for a decay of 0.9 and those of the model's first layer, on random rows; and the trained losses."""
  rates = decay_rates(cfg.model.decay, cfg.model.heads, cfg.model.layers)[0]
  decays = [math.exp(-rate) for rate in sorted({-math.log(0.9), *rates[rates > 0]})]
  both = {seed: measure(np.array(decays), seed) for seed in cfg.seeds}
  losses = parts.final(parts.curves(workdir, "loss"))
  heads, rows = [], []
  for i, decay in enumerate(decays):
    naive, robust = ({seed: errors[i] for seed, errors in zip(both, form, strict=True)} for form in _forms(both))
    wrong = {seed: _first(~(error < WRONG)) for seed, error in naive.items()}
    lost = {seed: _first(~np.isfinite(error)) for seed, error in naive.items()}
    largest = {seed: float(error.max()) for seed, error in robust.items()}
    predicted = stability.overflows_at(decay)
    heads.append(
      {
        "decay": decay,
        "factor_overflows_at": predicted,
        "naive_wrong_from": wrong,
        "naive_not_finite_from": lost,
        "robust_largest_error": largest,
      }
    )
    rows.append([_name(decay), predicted, *map(_steps, (wrong, lost)), f"{max(largest.values()):.1e}"])
  parts.write_results(workdir, {"tokens": LENGTH, "heads": heads, "trained": {"validation_loss": losses}})
  header = ["decay", "decay^-(t+1) overflows at t", f"naive output off by {WRONG:.0%} from t, by seed"]
  header += ["not finite from t, by seed", f"robust output: largest error in {LENGTH:,} tokens"]
  parts.finish(workdir, _draw(decays, both), "stability.png", parts.table(header, rows))


def measure(decays: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """[heads, length] each: the naive and the robust form's float32 errors on random rows, a head for each decay."""
  rng = np.random.default_rng(seed)
  q, k, v = rng.standard_normal((3, LENGTH, len(decays), WIDTH))
  batched = lambda *x: [a[None] for a in x]
  with jax.enable_x64(True):
    truth = np.asarray(reference.recurrent(*batched(q, k, v), decays)[0])[0]
  rows, rates = [np.float32(x) for x in (q, k, v)], np.float32(decays)
  robust = jax.jit(lambda *x: reference.recurrent(*batched(*x), rates)[0][0])(*rows)
  naive = jax.jit(lambda *x: stability.naive(*x, rates))(*rows)
  return tuple(stability.errors(np.asarray(out), truth).T for out in (naive, robust))


def _forms(both: dict[int, Any]):
  return zip(*both.values(), strict=True)


def _first(found: np.ndarray) -> int | None:
  return int(np.argmax(found)) if found.any() else None


def _steps(by_seed: dict[int, int | None]) -> str:
  return ", ".join("never" if t is None else str(t) for t in by_seed.values())


def _name(decay: float) -> str:
  rate = -math.log(decay)
  return f"e^-{round(rate)}" if abs(rate - round(rate)) < 1e-9 else f"{decay:.4g}"


def _draw(decays: list[float], both: dict[int, Any]):
  """The largest error up to each token, up to the first that is not finite."""
  fig, axes = parts.figure(2)
  seed, (naive, robust) = next(iter(both.items()))
  for ax, errors, title in zip(axes, (naive, robust), ("decay^t and decay^-t apart", "a decayed state"), strict=True):
    for i, (decay, error) in enumerate(zip(decays, errors, strict=True)):
      finite = error[: _first(~np.isfinite(error))]
      largest = np.maximum.accumulate(finite)
      ax.plot(1 + np.arange(len(finite)), largest, label=_name(decay), **parts.style(i) | {"marker": ""})
      if len(finite) < len(error):
        ax.plot(len(finite), largest[-1], "x", color="black", markersize=7, zorder=4)
    ax.set(xscale="log", yscale="log", ylim=(1e-8, 10), xlabel="tokens", title=title)
  axes[0].set_ylabel("largest error so far / mean output")
  axes[0].plot([], [], "x", color="black", label="last finite output")
  fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8, title="decay")
  fig.suptitle(f"Two ways to decode in float32, against float64; random rows, seed {seed}", fontsize=10)
  return fig
