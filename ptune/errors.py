"""Errors that users can fix: printed as one line, without a traceback."""

import difflib
import numbers
from collections.abc import Iterable, Sequence
from typing import Any


class UserError(ValueError):
  """A setting, a file or an argument cannot be used.

  The message gives the value, the expected value and the fix. The command line
  prints it and exits with status 2. Any other ValueError is a bug and keeps its
  traceback.
  """


def nearest(
  name: str, known: Iterable[str], *, most: int = 120, cutoff: float = 0.6
) -> str:
  """Returns '; did you mean ...?', or the known names if none is similar.

  Args:
    name: The name that was given.
    known: The valid names.
    most: If there are more valid names than this, they are not listed.
    cutoff: How similar a suggestion must be, from 0 to 1.
  """
  by_lower = {k.lower(): k for k in sorted(set(known))}
  near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=cutoff)
  if near:
    return f'; did you mean {" or ".join(_shown(by_lower[k]) for k in near)}?'
  listed = list(by_lower.values())
  return (
    f'; there are {", ".join(map(_shown, listed))}'
    if 0 < len(listed) <= most
    else ''
  )


def _shown(name: str) -> str:
  """A name, in quotes if it has blanks at its ends or invisible characters."""
  plain = name == name.strip() and name.isprintable() and name
  return name if plain else repr(name)


def some(names: Sequence[str], most: int = 10, noun: str = 'other') -> str:
  """Returns the first names, and how many others there are."""
  others, listed = len(names) - most, ', '.join(names[:most])
  return f'{listed} and {counted(others, noun)}' if others > 0 else listed


def counted(number: int, noun: str) -> str:
  """Returns '1 row', '2 rows'."""
  return f'{number} {noun}' if number == 1 else f'{number} {noun}s'


def check_counts(optional: bool = False, **counts: Any) -> None:
  """Raises UserError unless each value is a whole number of at least 1.

  Args:
    optional: Whether None is also valid.
    **counts: The values, by the names that users know.
  """
  wrong = [
    f'{name} is {value!r}'
    for name, value in counts.items()
    if not (optional and value is None)
    and (
      not isinstance(value, numbers.Integral)
      or isinstance(value, bool)
      or value < 1
    )
  ]
  if wrong:
    raise UserError(
      f'{", ".join(wrong)}; expected a whole number of at least 1'
      + (', or None' if optional else '')
    )
