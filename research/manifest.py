"""What ran: `manifest.json` in a workdir, and the check that a workdir holds one run only."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

from research import config, paths
from research.errors import UserError

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ml-collections", "tokenizers")
_PACKAGES += ("safetensors",)

# Fields that a continued run may change: they move work around, or how often it is looked at.
_MAY_CHANGE = ("mesh.", "checkpoint.", "log_every", "eval_every", "only", "seeds", "resume")
_MAY_CHANGE += (
  "init_from",
  "skip_nonfinite",
  "accumulate",
  "model.remat",
  "model.layer_loop",
  "model.attention_kernel",
)


def open_workdir(
  workdir: paths.Path, cfg: config.RunConfig, spec: str, overrides: list[str], info: dict[str, Any], trains: bool
) -> None:
  """Creates or continues `workdir` and writes its manifest. Raises UserError if it holds another run.

  cfg is what `spec` (file.py:arg) and `overrides` on the command line made.

  A manifest has the config, the data of each arm (`info`) and, for every launch that
  `trains`, when, how and on what. The environment is not recorded: it may hold secrets.
  """
  path = workdir / "manifest.json"
  now = _plain({"config": config.flat(cfg), "data": info})
  launches = []
  if path.exists():
    try:
      before = json.loads(path.read_bytes())
      launches = list(before["launches"])
      differ = _differences(before, now, _plain(config.flat(type(cfg)())))
      now["data"] = {**before["data"], **now["data"]}
    except (ValueError, KeyError, TypeError, AttributeError):
      raise UserError("workdir", workdir, "its manifest.json is damaged; use another --workdir") from None
    if differ:
      fix = "use another --workdir (with --config.resume or --config.init_from to start from this one)"
      raise UserError("workdir", workdir, f"holds a run with other settings: {', '.join(differ)}; {fix}")
  if jax.process_index() != 0 or (launches and not trains):
    return
  launches.append(_launch(spec, overrides))
  paths.write(path, json.dumps({**now, "launches": launches}, indent=1) + "\n")


def _differences(before: dict, now: dict, defaults: dict) -> list[str]:
  # A field that came after the workdir was made had its default.
  old, new = {**defaults, **before["config"]}, now["config"]
  differ = [
    f"{name}={new.get(name)} (was {old.get(name)})"
    for name in sorted(old.keys() | new.keys())
    if old.get(name) != new.get(name) and not name.startswith(_MAY_CHANGE)
  ]
  arms = [arm for arm, data in now["data"].items() if before["data"].get(arm, data) != data]
  return differ + [f"the data of arm {arm} (its hash is another)" for arm in arms]


def _plain(tree: Any) -> Any:
  return json.loads(json.dumps(tree))


def _launch(spec: str, overrides: list[str]) -> dict[str, Any]:
  devices = jax.devices()
  return {
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "argv": sys.argv,
    "config": f"--config={spec}",
    "overrides": overrides,
    "python": platform.python_version(),
    "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    "devices": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
    "processes": jax.process_count(),
    "host": cpu(),
    "git": git(),
  }


def cpu() -> dict[str, Any]:
  """The processor's name and the number of cores this process may use."""
  name = platform.processor() or platform.machine()
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    name = names[0] if names else name
  return {"cpu": name, "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}


def git() -> dict[str, Any]:
  """{"commit", "dirty"} of the source tree, or both None where it is no git checkout."""
  root = pathlib.Path(__file__).resolve().parents[1]

  def run(*args):
    return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True).stdout.strip()

  try:
    return {"commit": run("rev-parse", "HEAD"), "dirty": bool(run("status", "--porcelain"))}
  except (OSError, subprocess.CalledProcessError):
    return {"commit": None, "dirty": None}
