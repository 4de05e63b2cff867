"""What is launched: an experiment's command, checked on the user's machine, and the code at its commit."""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import re
import subprocess

from research import config, secrets
from research import run as runs
from research.errors import UserError, check

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Job:
  """`python -m experiments.<experiment>` with a config and overrides, relative to the root of the source tree."""

  experiment: str
  spec: str
  overrides: tuple[str, ...]

  def command(self, workdir: str, python: str = "python") -> list[str]:
    """The command line that runs it in `workdir`."""
    settings = [f"--config.{item}" for item in self.overrides]
    return [python, "-m", f"experiments.{self.experiment}", f"--config={self.spec}", *settings, f"--workdir={workdir}"]


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """The arguments before the first "--" and those after it. Raises UserError if one holds a credential."""
  secrets.refuse(argv)
  at = list(argv).index("--") if "--" in argv else len(argv)
  return list(argv[:at]), list(argv[at + 1 :])


def parse(argv: Sequence[str]) -> Job:
  """The job that `--config=FILE.py:ARG --config.NAME=VALUE ...` describes.

  The config is loaded, so that a mistake in it is told before anything is asked of a
  cloud. Raises UserError.
  """
  check(bool(argv), "command line", "--", "give the experiment's own arguments after it: -- --config=FILE.py")
  args, overrides = runs.parse_args(list(argv), workdir=False)
  cfg = config.load(args.config, overrides)
  config.expand(cfg)
  path, colon, arg = args.config.partition(":")
  full = pathlib.Path(path).resolve()
  check(full.is_relative_to(ROOT), "config", path, f"must lie in {ROOT}, whose commit is what runs")
  return Job(cfg.experiment, f"{full.relative_to(ROOT)}{colon}{arg}", tuple(overrides))


def commit(job: Job | None = None) -> str:
  """The commit that is checked out. Raises UserError if it is not what is there: what runs is the commit."""
  try:
    head, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
  except (OSError, subprocess.CalledProcessError):
    raise UserError("git", ROOT, "is no git checkout; launchers copy a commit, so clone the repository") from None
  check(not changed, "git", changed.splitlines()[0].strip() if changed else "", "commit it: what runs is the commit")
  if job is not None:
    path = job.spec.partition(":")[0]
    check(bool(_git("ls-files", path)), "config", path, "is not in the commit; git add and commit it")
  return head


def cache(dry: bool = False) -> pathlib.Path:
  """Where copies of the code are made on their way; it is this user's alone, unlike /tmp. Made unless `dry`."""
  root = os.environ.get("REPRISE_CACHE") or os.path.expanduser("~/.cache/reprise")
  place = pathlib.Path(root, "launch")
  if not dry:
    place.mkdir(parents=True, exist_ok=True)
  return place


def bundle(path: pathlib.Path) -> list[str]:
  """The command that writes the commit with its history as one file, which `git clone` takes."""
  return ["git", "-C", str(ROOT), "bundle", "create", "-q", str(path), "HEAD"]


def shared_workdir(path: str) -> str:
  """`path`, if machines that come and go can share it. Raises UserError."""
  fix = "name a bucket, gs://..., or an absolute path that every worker has mounted"
  check("://" in path or path.startswith("/"), "workdir", path or "''", fix)
  return path


def name(field: str, text: str, longest: int = 63) -> str:
  """`text`, if clouds take it as the name of a resource. Raises UserError."""
  fix = f"use lowercase letters, digits and -, a letter first, at most {longest} characters"
  check(bool(re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", text)) and len(text) <= longest, field, text or "''", fix)
  return text


def variables(names: Sequence[str]) -> tuple[str, ...]:
  """Names of environment variables. Raises UserError on NAME=VALUE: a value would be written down.

  The value is not shown: it may be the secret itself.
  """
  for text in names:
    fix = "give the name alone; the value must be in the worker's own environment, or its secret manager"
    check(bool(re.fullmatch(r"[A-Za-z_]\w*", text)), "env", "(not shown)", fix)
  return tuple(names)


def _git(*arguments: str) -> str:
  argv = ["git", "-C", str(ROOT), *arguments]
  return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.rstrip("\n")
