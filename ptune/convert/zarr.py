"""Zarr arrays of a checkpoint, read by TensorStore slice by slice.

T5X's older checkpoints are zarr directories; Orbax packs the same arrays into
an OCDBT key-value store. This module always builds the specs itself. A spec
from a file could make TensorStore read anything, so it is never passed on.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from ptune.convert.source import Index, Leaf, Shape
from ptune.errors import UserError

# TensorStore raises these if files are missing, damaged or inaccessible.
ERRORS = (ValueError, OSError, RuntimeError, NotImplementedError)


CHUNK_BYTES = 1 << 26


def subdirectory(directory: epath.Path, name: object) -> epath.Path:
  """Returns a directory that a checkpoint's file names; never one outside.

  Raises:
    ValueError: The name is not that of a direct child.
  """
  child = name.rstrip('/') if isinstance(name, str) else ''
  if child in ('', '.', '..') or '/' in child or '\\' in child:
    raise UserError(
      f'{directory} names an array {name!r}; it must be a directory directly '
      'below. The checkpoint is damaged or not to be trusted.'
    )
  return directory / child


def file_store(directory: epath.Path) -> dict[str, Any]:
  """Returns TensorStore's spec of a directory, local or gs://."""
  path = directory.as_posix()
  if path.startswith('gs://'):
    bucket, _, path = path.removeprefix('gs://').partition('/')
    return {'driver': 'gcs', 'bucket': bucket, 'path': f'{path}/'}
  return {'driver': 'file', 'path': f'{directory.resolve().as_posix()}/'}


def open_arrays(
  where: epath.Path,
  stores: Mapping[str, dict[str, Any]],
  *,
  driver: str = 'zarr',
  zeros_are_stored: bool = True,
) -> dict[str, Leaf]:
  """Opens the arrays of a checkpoint, all at once, without reading values.

  Args:
    where: The checkpoint, for errors.
    stores: The key-value store of each array, by a name for errors.
    driver: 'zarr' or 'zarr3'.
    zeros_are_stored: Whether the writer also stored chunks of zeros. If so, a
      missing chunk was lost, and reading it is an error.

  Returns:
    A leaf for each array, by the same names.

  Raises:
    ValueError: Arrays are missing or damaged; the error names all of them.
  """
  # Enough for OCDBT's tree. Each array is read once, so keeping chunks would
  # only add to the memory of a restore.
  context = ts.Context({'cache_pool': {'total_bytes_limit': 1 << 22}})
  opening = {
    name: ts.open(
      {
        'driver': driver,
        'kvstore': store,
        'fill_missing_data_reads': not zeros_are_stored,
      },
      open=True,
      read=True,
      context=context,
    )
    for name, store in stores.items()
  }
  leaves, broken = {}, {}
  for name, future in opening.items():
    try:
      leaves[name] = _leaf(f'{name} of {where}', future.result())
    except ERRORS as error:
      broken[name] = _short(error)
  if broken:
    # If the whole store is damaged, the cause is the same for all.
    raise UserError(
      f'{where}: {len(broken)} of {len(stores)} arrays are missing or damaged; '
      'copy it again.\n'
      + '\n'.join(f'  {name}' for name in broken)
      + f'\nThe first: {next(iter(broken.values()))}'
    )
  return leaves


def write_array(directory: epath.Path, leaf: Leaf) -> dict[str, Any]:
  """Writes an array to a new directory.

  Returns:
    TensorStore's spec of it; the caller adds the path.
  """
  spec: dict[str, Any] = {
    'driver': 'zarr',
    'dtype': leaf.dtype.name,
    'metadata': {
      'shape': list(leaf.shape),
      'chunks': _chunks(leaf.shape, leaf.dtype.itemsize),
      # Weights hardly compress, and gzip takes a minute for a gigabyte.
      'compressor': None,
    },
  }
  array = ts.open(
    {
      **spec,
      'kvstore': file_store(directory),
      # Store chunks of zeros too: our reader considers a missing chunk lost.
      'store_data_equal_to_fill_value': True,
    },
    create=True,
    write=True,
    # Keep no copy of written data.
    context=ts.Context({'cache_pool': {'total_bytes_limit': 0}}),
  ).result()
  array.write(leaf.read()).result()
  return spec


def _chunks(shape: Shape, itemsize: int) -> list[int]:
  """Halves the longest axis until a chunk is no larger than T5X's."""
  chunks = list(shape)
  while math.prod(chunks) * itemsize > CHUNK_BYTES:
    longest = max(range(len(chunks)), key=chunks.__getitem__)
    chunks[longest] = -(-chunks[longest] // 2)
  return chunks


def _leaf(where: str, array: ts.TensorStore) -> Leaf:
  def fetch(index: Index) -> np.ndarray:
    try:
      return array[index].read().result()
    except ERRORS as error:
      raise UserError(
        f'{where} cannot be read: its data is missing or damaged; copy it '
        f'again. {_short(error)}'
      ) from error

  return Leaf(tuple(array.shape), array.dtype.numpy_dtype, fetch)


def _short(error: Exception) -> str:
  """Returns TensorStore's message without its spec and source lines."""
  return re.sub(
    r' \[(tensorstore_spec|source locations)=.*', '', str(error), flags=re.S
  )
