"""Checks the paths that users give.

A path is local, with or without file://, or in a bucket. We read regular files
only, because reading a pipe or a device might never end.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from typing import Any

from ptune.errors import UserError

# Schemes of buckets (etils.epath), of models (ptune.convert.hub), and of files.
SCHEMES = ('gs', 's3', 'az', 'hf', 'ptune', 'file')
FILE = 'file://'
# The directories that this process has made; see `nothing_left`.
_made: list[Any] = []
_KINDS = {
  stat.S_IFDIR: 'a directory',
  stat.S_IFIFO: 'a pipe',
  stat.S_IFSOCK: 'a socket',
  stat.S_IFCHR: 'a device',
  stat.S_IFBLK: 'a device',
}


def fault(path: str) -> str:
  """What we expected instead, if a text is not a path; '' if it is one."""
  if not path.strip():
    return 'a path, not an empty text'
  if '\0' in path:
    return 'a path without NUL characters'
  try:
    path.encode()
  except UnicodeEncodeError:
    return 'a path in UTF-8'
  scheme = re.match(r'([A-Za-z][\w+.-]*)://', path)
  if scheme and scheme[1] not in SCHEMES:
    known = ', '.join(f'{name}://' for name in SCHEMES)
    return f'a local path, or one that begins with {known}'
  if path.startswith(FILE) and not path.startswith(f'{FILE}/'):
    return 'file:///... for the absolute path /...'
  return ''


def local(path: os.PathLike[str] | str, what: str = 'the path') -> str:
  """Returns a path as a string, without file:// and with ~ expanded.

  Args:
    path: The path.
    what: Its name in error messages.

  Raises:
    UserError: If it is not a valid path.
  """
  text = os.fspath(path)
  if expected := fault(text):
    raise UserError(f'{what} is {text!r}; expected {expected}')
  return os.path.expanduser(text.removeprefix(FILE))


def check_file(path: os.PathLike[str] | str, what: str = 'the file') -> str:
  """Returns a path as `local` does; checks that it can be a regular file.

  We do not check paths in buckets, or whether the file exists.

  Args:
    path: The path.
    what: Its name in error messages.

  Raises:
    UserError: If it is not a valid path, or is a directory, pipe or device.
  """
  text = local(path, what)
  try:
    kind = stat.S_IFMT(os.stat(text).st_mode)
  except OSError:
    return text
  if kind != stat.S_IFREG:
    raise UserError(
      f'{what} is {text!r}, which is {_KINDS.get(kind, "no file")}; expected a'
      ' file'
    )
  return text


def make_directory(directory: Any) -> None:
  """Makes a directory and its parents; `nothing_left` may remove them.

  Args:
    directory: An epath.Path or a pathlib.Path.
  """
  missing = []
  for place in (directory, *directory.parents):
    if place.exists():
      break
    missing.append(place)
  _made.extend(missing)  # First, because mkdir may fail halfway.
  directory.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
  """If an error is raised inside, removes the empty directories made inside.

  So a command that is refused leaves nothing behind.
  """
  _made.clear()
  try:
    yield
  except Exception:
    for place in sorted(_made, key=lambda p: -len(os.fspath(p))):
      with contextlib.suppress(OSError, ValueError):  # epath raises these.
        if '://' not in os.fspath(place):
          place.rmdir()
    raise
