"""Safetensors files: read slice by slice, written tensor by tensor.

A file is a JSON header (name, dtype, shape and position of each tensor) and the
tensors' bytes: https://github.com/huggingface/safetensors. We read with that
library. We write the format here, because the library takes all tensors at
once, and a model need not fit into memory.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath

from ptune.convert.source import Index, Leaf, nbytes
from ptune.errors import UserError
from ptune.host import paths

DTYPES = {
  'F64': 'float64',
  'F32': 'float32',
  'F16': 'float16',
  'BF16': 'bfloat16',
}


@contextlib.contextmanager
def _opened(file: epath.Path) -> Iterator[Any]:
  """Maps a safetensors file; an error names the file."""
  paths.check_file(file)
  try:
    with safetensors.safe_open(str(file), framework='numpy') as tensors:
      yield tensors
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(
      f'{file} is missing, damaged or cut short; download it again. {error}'
    ) from error


def open_file(file: epath.Path) -> tuple[dict[str, Leaf], dict[str, str]]:
  """Opens a local file without reading values.

  Returns:
    Its tensors by name, as stored, and its metadata.

  Raises:
    ValueError: The file is damaged or not local, or a tensor has an unsupported
      dtype.
  """
  if '://' in str(file):
    raise UserError(
      f'{file}: safetensors are mapped into memory, which needs local files. '
      f'Copy the directory: gcloud storage cp -r {file.parent} .'
    )
  found = {}
  with _opened(file) as tensors:
    metadata = dict(tensors.metadata() or {})
    for name in tensors.keys():
      view = tensors.get_slice(name)
      found[name] = tuple(view.get_shape()), view.get_dtype()
  unknown = [
    f'  {name}: {dtype}'
    for name, (_, dtype) in found.items()
    if dtype not in DTYPES
  ]
  if unknown:
    raise UserError(
      f'{file} has tensors of an unsupported dtype (expected '
      f'{", ".join(DTYPES)}):\n' + '\n'.join(unknown)
    )

  def leaf(name: str, shape: tuple[int, ...], dtype: str) -> Leaf:
    def fetch(index: Index) -> np.ndarray:
      # Map it again for each read: pages of an open mapping count as this
      # process's memory, in the end for the whole file.
      with _opened(file) as tensors:
        return tensors.get_slice(name)[index]

    return Leaf(shape, jnp.dtype(DTYPES[dtype]), fetch)

  leaves = {
    name: leaf(name, shape, dtype) for name, (shape, dtype) in found.items()
  }
  return leaves, metadata


def write_file(
  file: epath.Path, tensors: Mapping[str, Leaf], metadata: Mapping[str, str]
) -> None:
  """Writes tensors to a file, as `write` does; not atomic, see `output`."""
  with open(file, 'wb') as f:
    write(f, tensors, metadata)
    f.flush()
    os.fsync(f.fileno())


def write(
  f: BinaryIO, tensors: Mapping[str, Leaf], metadata: Mapping[str, str]
) -> None:
  """Writes tensors one after the other; holds one at a time.

  Args:
    f: The file to write to.
    tensors: The tensors, by name.
    metadata: Stored beside them; `format: pt` is added because transformers
      needs it.
  """
  names = {jnp.dtype(numpy): name for name, numpy in DTYPES.items()}
  header: dict[str, Any] = {'__metadata__': {'format': 'pt', **metadata}}
  end = 0
  # Wide dtypes come first, so that every tensor is aligned.
  order = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
  for name in order:
    start, end = end, end + nbytes(tensors[name])
    header[name] = {
      'dtype': names[tensors[name].dtype],
      'shape': list(tensors[name].shape),
      'data_offsets': [start, end],
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  f.write(len(text).to_bytes(8, 'little') + text)
  for name in order:
    block = np.ascontiguousarray(tensors[name].read())
    f.write(block.reshape(-1).view(np.uint8).data)
