"""What the tools share that write shards: alone in a directory, going on where they were stopped."""

from collections.abc import Mapping
import contextlib
import fcntl
import hashlib
import json
import pathlib
import sys
from typing import Any

from research import run
from research.data import shards
from research.errors import UserError, check


@contextlib.contextmanager
def alone(root: pathlib.Path):
  """Makes `root` and holds it for this process; Ctrl-C and what keeps it from writing there end in one line."""
  try:
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      yield
  except KeyboardInterrupt:
    print("interrupted; the same command goes on after the last whole shard", file=sys.stderr)
    sys.exit(run.EXIT_INTERRUPTED)
  except BlockingIOError:
    raise UserError("out", root, "another process is writing there") from None
  except OSError as e:
    raise UserError("out", root, f"cannot be written: {e.strerror or e}") from None


def begun(root: pathlib.Path, settings: Mapping[str, Any], form: int | str) -> dict:
  """The manifest of `root`. Raises UserError if its settings are others, or a shard is not what was written."""
  try:
    about = json.loads((root / shards.MANIFEST).read_bytes())
    before, splits = about["settings"], about["splits"].values()
    differ = [
      f"{k}={settings.get(k)} (was {before.get(k)})" for k in before | settings if before.get(k) != settings.get(k)
    ]
    check(not differ, "out", root, f"holds shards made with other settings: {', '.join(differ)}; use another --out")
    check(about["format"] == form, "out", root, f"holds shards of format {about['format']}; use another --out")
    for shard in [shard for split in splits for shard in split["shards"]]:
      path = root / shard["file"]
      whole = path.is_file() and _sha256(path) == shard["sha256"]
      check(whole, "out", root, f"{shard['file']} is missing or damaged; restore it, or use another --out")
  except (ValueError, KeyError, TypeError, AttributeError):
    raise UserError("out", root, f"its {shards.MANIFEST} is damaged; use another --out") from None
  return about


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()
