"""The pipeline on text: what sft and judge learnt, win rates during training, and who beats whom in the end."""

import numpy as np

from experiments.prefgames.reports import common
from research import paths, writers
from research import report as parts
from research.config import RunConfig, expand
from research.preference.methods import METHODS

_NAMES = {"online_ipo_uniform": "online IPO, flattened pairs", "sppo": "SPPO", "sft": "the sft model"}


def label(arm: str) -> str:
  """In words."""
  return _NAMES.get(arm) or common.label(arm)


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Three panels: the stages before, win rates against the sft model while training, the tournament's matrix."""
  singles = dict(expand(cfg))
  stages = {arm: single.text.stage for arm, single in singles.items()}
  losses, accuracy, win_rates = (parts.curves(workdir, name, needed=False) for name in ("loss", "accuracy", "win_rate"))
  wins, prompts = _tournament(workdir, [arm for arm, stage in stages.items() if stage == "tournament"])
  final = {name: parts.final(curves) for name, curves in (("loss", losses), ("accuracy", accuracy))}
  results, rows = {"arms": {}, "tournament": {}, "prompts": prompts}, []
  for arm, single in singles.items():
    if arm not in losses or stages[arm] == "tournament":
      continue
    about = {"stage": stages[arm], "updates": single.steps, "loss": final["loss"][arm]}
    cells = [label(arm), single.steps, parts.spread(list(final["loss"][arm].values()))]
    if arm in accuracy:
      about["accuracy"] = final["accuracy"][arm]
      cells.append(f"prefers the chosen one: {parts.spread(list(about['accuracy'].values()))}")
    elif arm in win_rates:
      row = METHODS[single.text.online.method]
      about["queries"] = row.queries * single.batch * single.steps * single.text.online.updates
      about["win_rate_while_training"] = parts.final(win_rates)[arm]
      cells.append(_against_sft(wins, arm))
    rows.append([*cells, *[""] * (4 - len(cells)), f"{about.get('queries', 0):,}" if "queries" in about else ""])
    results["arms"][arm] = about
  for (a, b), by_seed in wins.items():
    if a != b:
      rates, errors = ({seed: told[i] for seed, told in by_seed.items()} for i in range(2))
      results["tournament"].setdefault(a, {})[b] = {"rate": rates, "error": errors}
  parts.write_results(workdir, results)

  fig, axes = parts.figure(3)
  fig.set_size_inches(17, 5.6)
  before = {arm: curve for arm, curve in losses.items() if stages.get(arm) in ("sft", "judge")}
  _lines(axes[0], before, "validation loss", {"sft": "sft, nats a token", "judge": "judge, nats a pair"})
  _lines(axes[1], win_rates, "win rate against the sft model", {})
  if win_rates:
    axes[1].axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
  _matrix(fig, axes[2], wins, prompts)
  told = f"{cfg.data.source}: {cfg.model.layers} layers of width {cfg.model.width}, {common.seeds(cfg)}"
  fig.suptitle(told, fontsize=11)
  header = ["stage or method", "updates", "validation loss", "win rate against the sft model, ± standard error"]
  parts.finish(workdir, fig, "text.png", parts.table([*header, "preferences asked for"], rows))


def _tournament(workdir: paths.Path, arms: list[str]):
  """({(row, column): {seed: (rate, its error)}}, prompts): of the last evaluation; empty where none was held."""
  wins, prompts = {}, 0
  for r in writers.read(workdir / "metrics.jsonl"):
    if r["kind"] == "eval" and r["arm"] in arms:
      prompts = int(r.get("wins/prompts", 0))
      for name, rate in r.items():
        if name.startswith("wins/rate/"):
          _, _, a, b = name.split("/")
          wins.setdefault((a, b), {})[r["seed"]] = (rate, r[f"wins/error/{a}/{b}"])
  return wins, prompts


def _mean(by_seed) -> tuple[float, float]:
  """Over seeds: the mean rate, and its error from those of the seeds alone, which share the prompts."""
  rates, errors = zip(*by_seed.values(), strict=True)
  return float(np.mean(rates)), float(np.mean(errors))


def _against_sft(wins, arm: str) -> str:
  if (arm, "sft") not in wins:
    return "no tournament yet"
  rate, error = _mean(wins[arm, "sft"])
  return f"{100 * rate:.1f} ± {100 * error:.1f} %"


def _lines(ax, curves, ylabel: str, names: dict[str, str]) -> None:
  parts.draw(ax, curves, lambda arm: names.get(arm, label(arm)))
  ax.set(xlabel="updates", ylabel=ylabel)
  if curves:
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
  else:
    ax.text(0.5, 0.5, "not trained yet", ha="center", va="center", transform=ax.transAxes, color="grey")


def _matrix(fig, ax, wins, prompts: int) -> None:
  """Who beats whom, in per cent with the standard error, rows against columns."""
  names = list(dict.fromkeys(a for a, _ in wins))
  if not names:
    ax.text(0.5, 0.5, "no tournament yet", ha="center", va="center", transform=ax.transAxes, color="grey")
    return
  table = np.array([[_mean(wins[a, b]) for b in names] for a in names])
  common.matrix(fig, ax, table[..., 0], [label(name) for name in names], table[..., 1])
  ax.set_title(f"how often the row beats the column, %, by the judge\n{prompts} held-out prompts", fontsize=9)
