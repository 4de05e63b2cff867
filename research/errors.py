"""The one exception a user may see: a mistake told in a line."""

from typing import Any


class UserError(Exception):
  """A mistake of the user's: names the field, its value and the fix.

  `research.run.main` and the tools print it as one line on stderr and exit with
  status 2; everything else is a defect and keeps its traceback.
  """

  def __init__(self, field: str, value: object, fix: str):
    self.field, self.value, self.fix = field, value, fix
    super().__init__(field, value, fix)

  def __str__(self) -> str:
    return f"{self.field}={self.value}: {self.fix}"

  def under(self, prefix: str) -> "UserError":
    """The same mistake, its field named from one level further out."""
    return UserError(f"{prefix}.{self.field}", self.value, self.fix)


def one_line(error: BaseException) -> str:
  """What a library's exception says, as a part of a message: on one line, its first 200 characters."""
  return " ".join(str(error).split())[:200]


def first_line(error: BaseException) -> str:
  """The same of one whose further lines are for nobody, such as a status of gRPC or a trace of orbax's."""
  return next(iter(str(error).splitlines()), "")[:200]


def check_range(field: str, x: Any, stop: int) -> None:
  """Raises UserError unless all of an array of whole numbers lie in 0 .. stop - 1."""
  low, high = (x.min(), x.max()) if x.size else (0, 0)
  check(low >= 0 and high < stop, field, int(low if low < 0 else high), f"must lie in 0 .. {stop - 1}")


def check(ok: bool, field: str, value: object, fix: str) -> None:
  """Raises `UserError(field, value, fix)` unless `ok`."""
  if not ok:
    raise UserError(field, value, fix)
