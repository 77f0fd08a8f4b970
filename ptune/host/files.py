"""Writing files and directories."""

import os
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
    # A full disk may still have room for a few bytes, so write more.
    probe.write_bytes(bytes(65536))
    probe.unlink()
  except Exception as error:
    # For a bucket, TensorFlow raises errors of its own.
    if not isinstance(error, OSError) and '://' not in os.fspath(directory):
      raise
    reason = getattr(error, 'strerror', None) or error
    raise UserError(
      f'{name} {directory} cannot be written: {reason}. Choose another'
      ' directory, or free space'
    ) from error


def write_atomically(path: epath.Path, data: bytes | str) -> None:
  """Writes a file so that it is never incomplete, even if we are killed."""
  temporary = path.parent / f'.{path.name}.tmp'
  try:
    with temporary.open('wb') as f:
      f.write(data.encode() if isinstance(data, str) else data)
      to_disk(f)
    temporary.replace(path)
  except OSError:
    temporary.unlink(missing_ok=True)
    raise


def to_disk(file: Any) -> None:
  """Waits until the written data is on the disk, in case power fails."""
  file.flush()
  if hasattr(file, 'fileno'):  # A bucket's file has none.
    os.fsync(file.fileno())
