"""Where a run's files are: a local directory or, through etils.epath, one in a bucket (gs://BUCKET/DIR).

In a bucket nothing can be appended to, renamed or locked, and what is written to an object
is there whole or not at all. The few places where that matters ask `in_bucket`.
"""

import importlib.util
import logging
import os
import pathlib
import re

from etils import epath

from research.errors import UserError, check, one_line

Path = pathlib.Path | epath.Path


def parse(path: str | os.PathLike, field: str = "workdir") -> Path:
  """The path that `path` names; what is a path already comes back as it is.

  Raises UserError, naming `field`, for a bucket that is not there, cannot be reached or
  may not be read; and where the extra `gcs` is missing.
  """
  if not isinstance(path, str):
    return path
  scheme = re.match(r"(\w+)://", path)
  if not scheme:
    return pathlib.Path(path)
  check(scheme[1] == "gs", field, path, "name a local directory, or one in a bucket: gs://BUCKET/DIR")
  bucket = path.removeprefix("gs://").partition("/")[0]
  check(len(bucket) > 2, field, path, "names no bucket; gs://BUCKET/DIR")
  missing = importlib.util.find_spec("gcsfs") is None
  check(not missing, field, path, "needs the extra gcs: pip install -e '.[gcs]'")
  try:
    # The least that finds out whether there is such a bucket: it needs no right but to list objects.
    _gcs().call("GET", "b/{}/o", bucket, maxResults=1)
  except Exception as e:
    raise bad(path, field, e) from None
  return epath.Path(path)


def cache() -> pathlib.Path:
  """Where what can be made again is kept for the next run: $REPRISE_CACHE, by default ~/.cache/reprise."""
  return pathlib.Path(os.environ.get("REPRISE_CACHE") or "~/.cache/reprise").expanduser()


def in_bucket(path: str | os.PathLike) -> bool:
  """Whether `path` is one in a bucket."""
  return os.fspath(path).startswith("gs://")


def bad(path: str | os.PathLike, field: str, error: Exception) -> UserError:
  """What the libraries beneath raised at a path in a bucket, as a mistake told in one line."""
  bucket = "/".join(os.fspath(path).split("/")[:3])
  if isinstance(error, FileNotFoundError):
    return UserError(field, path, f"there is no bucket {bucket}: gcloud storage buckets create {bucket}")
  said = f"{type(error).__name__}: {one_line(error)}"
  unknown = getattr(error, "code", None) == 401 or type(error).__module__.startswith("google.auth")
  if unknown or str(error).startswith("Forbidden"):
    fix = "sign in (gcloud auth application-default login), or give this account the role roles/storage.objectAdmin"
    return UserError(field, path, f"access to {bucket} is refused: {fix} ({said})")
  return UserError(field, path, f"{bucket} cannot be reached; look at its name and at the network ({said})")


def write(path: Path, text: str) -> None:
  """Makes `text` the content of a file, whole or not at all, and on the disk when it returns."""
  if in_bucket(path):
    path.write_text(text)
    return
  temporary = path.with_name(path.name + ".tmp")
  with temporary.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)


def move(path: Path, to: Path) -> None:
  """Renames a directory. In a bucket that is a copy, within the service, of every object, then their removal."""
  if not in_bucket(path):
    path.rename(to)
    return
  _gcs().copy(os.fspath(path), os.fspath(to), recursive=True)
  path.rmtree()


def _gcs():
  """The file system that epath uses for gs://."""
  import fsspec

  os.environ.setdefault("EPATH_USE_TF", "false")  # the same library for gs:// where tensorflow is installed, too
  # Flat access does for every bucket but zonal ones; asking for each bucket's kind would take a service of its own.
  os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it raises what it logs, tracebacks and all
  # tensorstore and other processes write there too: what was listed once may have changed.
  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
  return fsspec.filesystem("gcs", finalize_on_close=True)
