"""Training speed and memory against length, at a fixed number of tokens a batch."""

import statistics
from typing import Any

import numpy as np

from experiments.transnormer.reports.common import label
from research import comparison, config, paths, runs
from research import report as parts
from research.config import RunConfig
from research.fit import abstract_batch, abstract_state, jit_step
from research.mesh import on_devices


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Tokens a second, the median over a run's steps but for the first, and memory; arms are named <attention>-<length>.

  Memory is what the compiler sets aside beside the parameters, the moments and the batch
  (`temp_size_in_bytes` of its analysis): activations, most of all.
  """
  times = parts.curves(workdir, "step_seconds", kind="train")
  found: dict[str, dict[int, dict[str, Any]]] = {}
  for arm, single in comparison.singles(cfg):
    if arm in times and single.seed == cfg.seed:
      tokens = single.batch * single.length
      # the first step compiles
      speed = {seed: tokens / statistics.median(_rest(points)) for seed, points in times[arm].items()}
      found.setdefault(arm.rpartition("-")[0], {})[single.length] = {
        "tokens_per_second": speed,
        "temporaries_mib": temporaries(single) / 2**20,
      }
  parts.write_results(workdir, {"attentions": found, "tokens_per_batch": tokens})
  lengths = sorted({length for of in found.values() for length in of})
  rows = [[f"{length:,}", *(_cell(of.get(length)) for of in found.values())] for length in lengths]

  fig, axes = parts.figure(2)
  for i, (attention, of) in enumerate(found.items()):
    at = sorted(of)
    values = [list(of[length]["tokens_per_second"].values()) for length in at]
    mean = np.array([np.mean(v) for v in values])
    reach = [mean - [min(v) for v in values], [max(v) for v in values] - mean]
    axes[0].errorbar(at, mean, yerr=reach, capsize=3, label=label(attention), **parts.style(i))
    axes[1].plot(at, [of[length]["temporaries_mib"] for length in at], label=label(attention), **parts.style(i))
  for ax in axes:
    ax.set(xscale="log", xlabel="tokens a row")
    ax.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=8)
    ax.set_xticks([], minor=True)
  axes[0].set(yscale="log", ylabel="training tokens / second", title=f"Speed: {parts.over_seeds(times)}")
  axes[1].set(ylim=(0, None), ylabel="temporaries of a step (MiB)", title="Memory, as compiled")
  fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
  fig.suptitle(f"{tokens:,} tokens a batch, {cfg.model.layers} layers, width {cfg.model.width}", fontsize=10)
  header = ["tokens a row", *(f"{label(attention)}: tokens/s, MiB" for attention in found)]
  parts.finish(workdir, fig, "lengths.png", parts.table(header, rows))


def temporaries(cfg: RunConfig) -> int:
  """Bytes on one device beside the arguments and results of a compiled training step."""
  with runs.mesh():
    exp = config.experiment_module(cfg.experiment).build(cfg)
    state, batch = on_devices(abstract_state(exp)), on_devices(abstract_batch(exp))
    return jit_step(exp, cfg, state).lower(state, batch).compile().memory_analysis().temp_size_in_bytes


def _rest(points: list[tuple[int, float]]) -> list[float]:
  values = [seconds for _, seconds in points]
  return values[1:] or values


def _cell(measured: dict[str, Any] | None) -> str:
  if measured is None:
    return ""
  speed = np.mean(list(measured["tokens_per_second"].values()))
  return f"{speed:,.0f}, {measured['temporaries_mib']:,.0f}"
