"""Files and directories that ptune writes."""

import os
from typing import Any

from etils import epath

from ptune.errors import UserError
from ptune.host import paths


def absolute(path: os.PathLike[str] | str) -> epath.Path:
  """A path that means the same in any working directory.

  Raises:
    UserError: If it is no path.
  """
  text = paths.local(path)
  return epath.Path(text if '://' in text else os.path.abspath(text))


def check_writable(name: str, directory: epath.Path) -> None:
  """Makes a directory, and finds out whether results can be written there.

  Raises:
    ValueError: If not; `name` is what users call it.
  """
  try:
    paths.make_directory(directory)
    probe = directory / f'.writable-{os.getpid()}'
    # A full disk may still take a few bytes.
    probe.write_bytes(bytes(65536))
    probe.unlink()
  except OSError as error:
    raise UserError(
      f'{name} {directory} cannot be written: {error.strerror or error}. Choose'
      ' another, or free space'
    ) from error


def write_atomically(path: epath.Path, data: bytes | str) -> None:
  """Writes a file that is either there and whole, or not there."""
  temporary = path.parent / f'.{path.name}.tmp'
  with temporary.open('wb') as f:
    f.write(data.encode() if isinstance(data, str) else data)
    to_disk(f)
  temporary.replace(path)


def to_disk(file: Any) -> None:
  """Waits until what was written lies on the disk: power may fail."""
  file.flush()
  if hasattr(file, 'fileno'):  # A bucket's file has none.
    os.fsync(file.fileno())
