"""A prompt as an array, and as a file in NumPy's format."""

import math
import os
import tokenize

import jax.numpy as jnp
import numpy as np
from etils import epath

from ptune.errors import UserError, nearest
from ptune.host import paths


def read(path: str | os.PathLike[str]) -> np.ndarray:
  """Reads a prompt file.

  Args:
    path: A file in NumPy's format, whatever its suffix. `.npy` may be left out.

  Returns:
    [prompt, embed] float32.

  Raises:
    FileNotFoundError: If there is no such file; names the nearest ones.
    UserError: If the file is not in NumPy's format, holds pickled objects, or
      is not a finite two-dimensional array of numbers.
  """
  file = epath.Path(paths.check_file(path, 'prompt file'))
  if not file.exists():
    suffixed = epath.Path(f'{file}.npy')
    if not suffixed.is_file():
      raise FileNotFoundError(_missing(file))
    file = suffixed
  array = read_array(file)
  if array.ndim != 2 or array.dtype.kind not in 'fiu':
    raise UserError(
      f'prompt file {file} holds {array.dtype} {list(array.shape)}; a prompt'
      ' is [prompt, embed] floats'
    )
  with np.errstate(over='ignore'):  # Too large values are reported below.
    array = array.astype(np.float32)
  if not np.isfinite(array).all():
    raise UserError(f'prompt file {file} holds NaN or infinity')
  return array


# NumPy's errors at a damaged header.
_DAMAGED = (
  ValueError,
  EOFError,
  KeyError,
  TypeError,
  SyntaxError,
  RecursionError,
  MemoryError,
  OverflowError,
  tokenize.TokenError,
)


def read_array(file: epath.Path) -> np.ndarray:
  """Reads a file in NumPy's format, whatever its suffix; never a pickle.

  Raises:
    UserError: If the file has another format or is damaged.
  """
  size = file.stat().length
  try:
    with file.open('rb') as f:
      version = np.lib.format.read_magic(f)
      read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
      }[version]
      shape, transposed, dtype = read_header(f)
      if dtype.hasobject:
        raise UserError('it holds pickled objects, which are not loaded')
      # Checked before memory is allocated, because the header may be wrong.
      left = size - f.tell()
      if left != math.prod(shape) * dtype.itemsize:
        raise UserError(
          f'{left} bytes follow a header that says {list(shape)} {dtype}'
        )
      data = f.read()
    order = 'F' if transposed else 'C'
    if dtype == np.dtype('V2'):  # NumPy's format stores bfloat16 as this.
      dtype = np.dtype(jnp.bfloat16)
    return np.frombuffer(data, dtype).reshape(shape, order=order)
  except _DAMAGED as error:
    said = str(error)
    said = said if len(said) < 200 else f'{said[:200]}...'
    raise UserError(
      f'prompt file {file} ({size} bytes) is not a NumPy array file, or is'
      f' damaged or cut short: {said}'
    ) from error


def _missing(file: epath.Path) -> str:
  names = []
  if file.parent.is_dir():
    names = [child.name for child in file.parent.iterdir()]
  near = nearest(file.name, names, most=0, cutoff=0.4)
  return f'there is no prompt file {file}{near}'


def fit(array: np.ndarray, shape: tuple[int, int], what: str) -> np.ndarray:
  """Checks the shape of a prompt and copies it as float32.

  Args:
    array: The prompt.
    shape: The shape that it must have.
    what: Where the prompt comes from, for the error.

  Raises:
    UserError: If it has another shape.
  """
  array = np.array(array, np.float32)
  if array.shape != tuple(shape):
    raise UserError(
      f'{what} has shape {list(array.shape)}, but the prompt is'
      f' {list(shape)} [PROMPT_LENGTH, d_model of the model]; change'
      ' PROMPT_LENGTH or the model file'
    )
  return array
