"""Paths as users give them: what is no path, or no file, is refused.

A path is local, as it stands or behind file://, or in a bucket. A file that is
read is a regular one: a pipe or a device would be read for ever.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from typing import Any

from ptune.errors import UserError

# Of buckets (etils.epath), of models by name (ptune.convert.hub), of files.
SCHEMES = ('gs', 's3', 'az', 'hf', 'ptune', 'file')
FILE = 'file://'
# Directories that this process has made, see `nothing_left`.
_made: list[Any] = []
_KINDS = {
  stat.S_IFDIR: 'a directory',
  stat.S_IFIFO: 'a pipe',
  stat.S_IFSOCK: 'a socket',
  stat.S_IFCHR: 'a device',
  stat.S_IFBLK: 'a device',
}


def fault(path: str) -> str:
  """What keeps a text from being a path: '' if nothing does."""
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
  """A path as a text, without file:// and with the home directory of ~.

  Args:
    path: The path.
    what: What users call it, for messages.

  Raises:
    UserError: If it is no path.
  """
  text = os.fspath(path)
  if expected := fault(text):
    raise UserError(f'{what} is {text!r}; expected {expected}')
  return os.path.expanduser(text.removeprefix(FILE))


def check_file(path: os.PathLike[str] | str, what: str = 'the file') -> str:
  """Returns a path as `local` does, if a regular file can be there.

  Paths in buckets and paths where nothing is are for the reader to refuse.

  Args:
    path: The path.
    what: What users call it, for messages.

  Raises:
    UserError: If it is no path, or there is a directory, a pipe or a device.
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
  """Makes a directory and those above it; `nothing_left` may remove them.

  Args:
    directory: An epath.Path, or one of pathlib.
  """
  missing = []
  for place in (directory, *directory.parents):
    if place.exists():
      break
    missing.append(place)
  directory.mkdir(parents=True, exist_ok=True)
  _made.extend(missing)


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
  """Removes the directories that were made within, if it fails before use.

  A command that is refused leaves nothing behind. Directories with anything in
  them stay.
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
