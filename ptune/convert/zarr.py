"""Zarr arrays of a checkpoint, read by TensorStore slice by slice.

T5X's older checkpoints are zarr directories; Orbax packs the same arrays into
an OCDBT key-value store. Specs are always built here: one found in a file is
never handed to TensorStore, which could read anything by it.
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

# What TensorStore raises for files that are missing, damaged or out of reach.
ERRORS = (ValueError, OSError, RuntimeError, NotImplementedError)


CHUNK_BYTES = 1 << 26


def subdirectory(directory: epath.Path, name: object) -> epath.Path:
  """A directory named by a file of the checkpoint; never one outside of it.

  Raises:
    ValueError: the name is not that of a direct child.
  """
  child = name.rstrip('/') if isinstance(name, str) else ''
  if child in ('', '.', '..') or '/' in child or '\\' in child:
    raise UserError(
      f'{directory} names an array {name!r}; it must be a directory directly '
      'below. The checkpoint is damaged or not to be trusted.'
    )
  return directory / child


def file_store(directory: epath.Path) -> dict[str, Any]:
  """TensorStore's spec of a directory, local or gs://."""
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
  """Opens the arrays of a checkpoint, all at once; reads none of their values.

  Args:
    where: The checkpoint, for errors.
    stores: The key-value store of each array, by a name for errors.
    driver: 'zarr' or 'zarr3'.
    zeros_are_stored: Whether the writer stored chunks of zeros too. If so, a
      chunk that is not there was lost, and reading it is an error.

  Returns:
    A leaf for each array, by the same names.

  Raises:
    ValueError: arrays are missing or damaged; all of them are named.
  """
  # Enough for OCDBT's tree. Arrays are read once each: to keep their chunks
  # would only add to the memory that a restore needs.
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
    # The cause is the same for all where the whole store is damaged.
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
    TensorStore's spec of it, to which the caller adds where it lies.
  """
  spec: dict[str, Any] = {
    'driver': 'zarr',
    'dtype': leaf.dtype.name,
    'metadata': {
      'shape': list(leaf.shape),
      'chunks': _chunks(leaf.shape, leaf.dtype.itemsize),
      # Weights hardly get smaller, and gzip takes a minute for a gigabyte.
      'compressor': None,
    },
  }
  array = ts.open(
    {
      **spec,
      'kvstore': file_store(directory),
      # Chunks of zeros too: our reader takes one that is not there for lost.
      'store_data_equal_to_fill_value': True,
    },
    create=True,
    write=True,
    # Keeps no copy of what was written.
    context=ts.Context({'cache_pool': {'total_bytes_limit': 0}}),
  ).result()
  array.write(leaf.read()).result()
  return spec


def _chunks(shape: Shape, itemsize: int) -> list[int]:
  """Cuts the longest axis in halves until a chunk is no larger than T5X's."""
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
  """TensorStore's message without the spec and the source lines it adds."""
  return re.sub(
    r' \[(tensorstore_spec|source locations)=.*', '', str(error), flags=re.S
  )
