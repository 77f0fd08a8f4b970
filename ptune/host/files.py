"""Writing files and directories."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from ptune.errors import UserError
from ptune.host import paths


def absolute(path: os.PathLike[str] | str) -> epath.Path:
  """Makes a path absolute.

  Raises:
    UserError: If it is not a valid path.
  """
  text = paths.local(path)
  return epath.Path(text if '://' in text else os.path.abspath(text))


def check_writable(name: str, directory: epath.Path) -> None:
  """Makes a directory and checks that we can write to it.

  Raises:
    ValueError: If we cannot; the error calls the directory `name`.
  """
  try:
    paths.make_directory(directory)
    probe = directory / f'.writable-{os.getpid()}'
    try:
      # A full disk may still have room for a few bytes, so write more.
      probe.write_bytes(bytes(65536))
    finally:
      probe.unlink(missing_ok=True)
  except Exception as error:
    # For a bucket, TensorFlow raises errors of its own.
    if not isinstance(error, OSError) and '://' not in os.fspath(directory):
      raise
    reason = getattr(error, 'strerror', None) or error
    raise UserError(
      f'{name} {directory} cannot be written: {reason}. Choose another'
      ' directory, or free space'
    ) from error


def is_full(error: BaseException) -> bool:
  """Whether an error says that a disk is full, whoever raised it.

  TensorStore and TensorFlow have exceptions of their own.
  """
  full = ('No space left on device', 'Disk quota exceeded', 'File too large')
  return any(text in f'{error} {error.__cause__}' for text in full)


@contextlib.contextmanager
def writing(path: os.PathLike[str]) -> Iterator[None]:
  """Names the output and the fix if it cannot be written.

  Args:
    path: The output. What is written inside are temporary files beside it,
      whose names begin with a dot and its name.
  """
  folder, name = os.path.split(os.path.abspath(path))
  try:
    yield
  except Exception as error:
    file = os.fspath(getattr(error, 'filename', None) or '')
    if not is_full(error) and not str(file).startswith(f'{folder}/.{name}'):
      raise  # About something else, such as an input.
    reason = getattr(error, 'strerror', None) or 'No space left on device'
    kind = type(error) if isinstance(error, OSError) else OSError
    raise kind(
      f'{os.fspath(path)} cannot be written: {reason}. Free space there, or'
      ' choose another place'
    ) from error


def write_atomically(path: epath.Path, data: bytes | str) -> None:
  """Writes a file so that it is never incomplete, even if we are killed."""
  temporary = path.parent / f'.{path.name}.tmp'
  try:
    with writing(path):
      with temporary.open('wb') as f:
        f.write(data.encode() if isinstance(data, str) else data)
        to_disk(f)
      temporary.replace(path)
  except OSError:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise


def to_disk(file: Any) -> None:
  """Waits until the written data is on the disk, in case power fails."""
  file.flush()
  if hasattr(file, 'fileno'):  # A bucket's file has none.
    os.fsync(file.fileno())
