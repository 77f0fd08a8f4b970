"""Outputs that are either whole or not there.

Everything is written beside its place under a temporary name, and renamed when
it is complete. What is there is replaced only if asked for.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator

from etils import epath

from ptune.errors import UserError


def check(
  path: epath.PathLike,
  overwrite: bool = False,
  marks: tuple[str, ...] = (),
  inputs: tuple[str, ...] = (),
) -> epath.Path:
  """Finds out, before any work, whether an output can be written.

  Args:
    path: The file or directory.
    overwrite: Whether one that is there may be replaced.
    marks: Names of which a directory that is replaced must hold one: that it
      is an output of the same kind, and not somebody's home.
    inputs: What is read; must not lie in a directory that is replaced.

  Returns:
    The path.

  Raises:
    ValueError: it is there, is not local, or is not to be replaced.
  """
  if '://' in os.fspath(path):
    raise UserError(
      f'--output={path} is not local, where a rename is not atomic. Write it '
      'to a disk and copy it: gcloud storage cp -r ...'
    )
  path = epath.Path(os.path.abspath(epath.Path(path).expanduser()))
  if not path.exists():
    return path
  if not overwrite:
    raise UserError(
      f'{path} exists already; nothing was written. Choose another --output, '
      'or replace it with --overwrite'
    )
  if path.is_dir():
    names = {child.name for child in path.iterdir()}
    if names and not names & set(marks):
      raise UserError(
        f'--output={path} is a directory that holds '
        f'{", ".join(sorted(names)[:10])}: '
        + (f'none of {", ".join(marks)}' if marks else 'and no file')
        + ', so that it is no earlier output. It is not replaced'
      )
    for used in inputs:
      if epath.Path(os.path.abspath(used)).is_relative_to(path):
        raise UserError(
          f'--output={path} holds {used}, which is read. Choose another'
        )
  return path


@contextlib.contextmanager
def new_directory(path: epath.Path) -> Iterator[epath.Path]:
  """A temporary directory that takes the place of `path` at the end.

  Does so only if the body raises nothing; otherwise all is as before.
  """
  temporary = _beside(path, 'tmp')
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary.mkdir()
  try:
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
  """The same for a file."""
  temporary = _beside(path, 'tmp')
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    yield temporary
    temporary.replace(path)
  finally:
    _remove(temporary)


def _beside(path: epath.Path, what: str) -> epath.Path:
  return path.parent / f'.{path.name}.{what}-{os.getpid()}'


def _remove(path: epath.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  elif path.exists():
    path.unlink()
