"""Keeps credentials out of command lines, since those are written down: in manifests, logs and checkpoints."""

from collections.abc import Mapping, Sequence
import os
import re

from research.errors import UserError

_IN_URL = re.compile(r"://[^/@\s]+@|[?&][\w-]*(token|key|signature|sig|secret|password)=", re.IGNORECASE)
_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIAL", re.IGNORECASE)
_PATH = re.compile(r"^/.*\.\w+$")  # of a file of credentials; a key may begin with a slash, but has no suffix
_SHORTEST = 12  # a shorter value of such a variable may be an ordinary word


def refuse(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> None:
  """Raises UserError, which does not show the value, if an argument holds a credential.

  That is a user, password or token in a URL, or the value of an environment variable
  whose name says that it is secret (the path of a file of credentials may be named).
  """
  values = {v for k, v in environ.items() if _NAMES.search(k) and len(v) >= _SHORTEST and not _PATH.search(v)}
  for argument in argv:
    name = argument.partition("=")[0] if argument.startswith("-") and "=" in argument else "argument"
    if any(value in name for value in values) or _IN_URL.search(name):
      name = "argument"
    if _IN_URL.search(argument):
      raise UserError(name, "(not shown)", "has a credential in a URL; leave it out, tokens come from the environment")
    if any(value in argument for value in values):
      raise UserError(name, "(not shown)", "has the value of a secret environment variable; leave it out")
