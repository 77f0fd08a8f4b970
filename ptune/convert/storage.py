"""Users' files: local, file://, or on gs://, which TensorFlow reads."""

import glob as glob_lib
import json
import os
from typing import Any

from etils import epath

from ptune.errors import UserError
from ptune.host import paths
from ptune.host.quiet import quiet_stderr

BUCKETS = ('gs://', 's3://', 'az://')
PathLike = str | os.PathLike[str]


def local(path: PathLike) -> str | None:
  """Returns the path of a local file, or None if it is not local."""
  path = os.fspath(path).removeprefix('file://')
  return None if '://' in path else path


def read_bytes(path: PathLike, name: str) -> bytes:
  """Reads a whole file.

  Args:
    path: The file.
    name: The setting that names it, for messages.

  Raises:
    UserError: It does not exist, cannot be read, or is not a regular file. A
      pipe or a device might never end.
  """
  try:
    place = local(path)
    if place is None:
      _check_bucket(os.fspath(path), name)
      return _read_remote(os.fspath(path))
    paths.check_file(place, name)
    with open(place, 'rb') as f:
      return f.read()
  except UserError:
    raise
  except (OSError, ValueError) as error:  # ValueError: a NUL in the path.
    where = f'A relative path starts at {os.getcwd()}'
    if isinstance(error, FileNotFoundError):
      raise UserError(
        f'{name} names {os.fspath(path)!r}, which does not exist. {where}; if'
        f' the file has moved, set {name} to its new path'
      ) from error
    raise UserError(
      f'{name} has {os.fspath(path)!r}, which cannot be read: '
      f'{" ".join(str(error).split())}. {where if local(path) else ""}'.rstrip()
    ) from error


def _read_remote(path: str) -> bytes:
  with quiet_stderr():
    import tensorflow as tf

    try:
      with tf.io.gfile.GFile(path, 'rb') as f:
        return f.read()
    except tf.errors.OpError as error:
      raise OSError(error.message) from error


def _check_bucket(path: str, name: str) -> None:
  """Refuses a path that is neither local nor in a bucket."""
  if path.startswith(BUCKETS):
    return
  hub = '. A data set of the Hub can be a task: tasks/from_hugging_face.gin'
  raise UserError(
    f'{name} has {path!r}; expected a local file, or one on gs://. Download the'
    f' file and give its path{hub if path.startswith("hf://") else ""}'
  )


def glob(pattern: str, name: str) -> list[str]:
  """Returns the files that match a pattern with `*`, sorted.

  Args:
    pattern: The pattern.
    name: The setting that has it, for messages.
  """
  place = local(pattern)
  if place is not None:
    return sorted(glob_lib.glob(place))
  _check_bucket(pattern, name)
  with quiet_stderr():
    import tensorflow as tf

    try:
      return sorted(tf.io.gfile.glob(pattern))
    except tf.errors.OpError as error:
      raise OSError(f'{pattern}: {error.message}') from error


def read_json(file: epath.Path) -> dict[str, Any]:
  """Reads a JSON object; raises ValueError if there is none."""
  if not file.exists():
    found = sorted(child.name for child in file.parent.iterdir())
    raise UserError(f'{file} is missing. Found: {", ".join(found)}')
  paths.check_file(file)
  try:
    value = json.loads(file.read_text())
  except (ValueError, RecursionError, OSError) as error:
    raise UserError(f'{file} is not JSON: {error}') from error
  if not isinstance(value, dict):
    raise UserError(f'{file} holds a {type(value).__name__}, not an object.')
  return value
