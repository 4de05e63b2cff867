"""What one epoch of tuning did: rewards, and the likelihood of images, step by step."""

from experiments.cca.reports.common import label
from research import paths
from research import report as parts
from research.config import RunConfig

# log p_theta - log p_phi of held-out images, and how well they are written
PANELS = {
  "reward_pos": "reward of images under their class (nats)",
  "reward_neg": "reward of images under another class (nats)",
  "ce": "cross-entropy under the class (nats a token)",
}
MEASURES = ("loss", *PANELS, "margin", "reward_accuracy")


def report(workdir: paths.Path, cfg: RunConfig) -> None:
  """Curves of the tuned arms on the validation split, and where they ended."""
  found = {name: parts.curves(workdir, name, needed=False) for name in MEASURES}
  arms = list(found["reward_pos"])
  ended = {name: parts.final({arm: of[arm] for arm in arms}) for name, of in found.items()}
  parts.write_results(workdir, {"arms": {arm: {name: ended[name][arm] for name in MEASURES} for arm in arms}})
  fig, axes = parts.figure(columns=len(PANELS))
  for ax, (name, words) in zip(axes, PANELS.items(), strict=True):
    parts.draw(ax, {arm: found[name][arm] for arm in arms}, label)
    ax.set_xlabel("updates", fontsize=9)
    ax.set_ylabel(words, fontsize=9)
  if arms:
    axes[0].legend(fontsize=8)
    axes[0].set_title(parts.over_seeds(found["loss"]), fontsize=10)
  rows = [[label(arm), *(parts.spread(list(ended[name][arm].values())) for name in MEASURES)] for arm in arms]
  parts.finish(workdir, fig, "rewards.png", parts.table(["arm", *MEASURES], rows))
