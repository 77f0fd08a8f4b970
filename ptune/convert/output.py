"""Outputs that are either complete or absent.

An output is written under a temporary name beside its final path, and renamed
when it is complete. An existing output is replaced only on request.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator

from etils import epath

from ptune.errors import UserError
from ptune.host.files import writing
from ptune.host.paths import make_directory


def check(
  path: epath.PathLike,
  overwrite: bool = False,
  marks: tuple[str, ...] = (),
  inputs: tuple[str, ...] = (),
) -> epath.Path:
  """Checks, before any work, whether an output can be written.

  Args:
    path: The file or directory.
    overwrite: Whether an existing output may be replaced.
    marks: A directory to replace must contain one of these names. They show
      that it is an earlier output, and not somebody's home.
    inputs: Files that are read; they must not be in a directory to replace.

  Returns:
    The path.

  Raises:
    ValueError: It exists, is not local, or must not be replaced.
  """
  if '://' in os.fspath(path):
    raise UserError(
      f'--output={path} is not local, and a rename elsewhere is not atomic.'
      ' Write to a disk and copy it: gcloud storage cp -r ...'
    )
  path = epath.Path(os.path.abspath(epath.Path(path).expanduser()))
  if not path.exists():
    return path
  if not overwrite:
    raise UserError(
      f'{path} exists already; nothing was written. Choose another --output, '
      'or replace it with --overwrite (overwrite=True in Python)'
    )
  if path.is_dir():
    names = {child.name for child in path.iterdir()}
    if (names or not marks) and not names & set(marks):
      raise UserError(
        f'--output={path} is a directory with '
        f'{", ".join(sorted(names)[:10]) or "nothing in it"}, '
        + (f'but none of {", ".join(marks)}' if marks else 'not a file')
        + ', so it is not an earlier output and was not replaced'
      )
    for used in inputs:
      if epath.Path(os.path.abspath(used)).is_relative_to(path):
        raise UserError(
          f'--output={path} contains {used}, an input. Choose another'
        )
  return path


@contextlib.contextmanager
def new_directory(path: epath.Path) -> Iterator[epath.Path]:
  """Yields a temporary directory that replaces `path` at the end.

  If the body raises an error, nothing changes.
  """
  temporary = _beside(path, 'tmp')
  _make(path, temporary.mkdir)
  try:
    with writing(path):
      yield temporary
      if path.exists():
        old = _beside(path, 'old')
        path.rename(old)
        temporary.rename(path)
        _remove(old)
      else:
        temporary.rename(path)
  finally:
    _remove(temporary)


@contextlib.contextmanager
def new_file(path: epath.Path) -> Iterator[epath.Path]:
  """Yields a temporary file that replaces `path` at the end."""
  temporary = _beside(path, 'tmp')
  _make(path, temporary.touch)
  try:
    with writing(path):
      yield temporary
      temporary.replace(path)
  finally:
    _remove(temporary)


def _make(path: epath.Path, make: Callable[[], None]) -> None:
  """Makes the parent of an output, and its temporary file or directory."""
  try:
    make_directory(path.parent)
    make()
  except OSError as error:
    raise UserError(
      f'{path} cannot be written: {error.strerror or error}. Choose another'
      ' --output'
    ) from error


def _beside(path: epath.Path, what: str) -> epath.Path:
  return path.parent / f'.{path.name}.{what}-{os.getpid()}'


def _remove(path: epath.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  elif path.exists():
    path.unlink()
