"""A table that accounts for everything in a checkpoint and in a model."""

import math
from collections.abc import Iterable, Mapping

import jax

from ptune.convert.source import Source
from ptune.host.columns import aligned
from ptune.model.model_info import format_bytes

Shaped = jax.Array | jax.ShapeDtypeStruct
SHOWN = 4


def restore_table(
  source: Source,
  restored: Mapping[str, Shaped],
  initialised: Mapping[str, Shaped] | None = None,
) -> str:
  """Returns a table of all restored, initialised and ignored arrays.

  Args:
    source: The checkpoint.
    restored: The parameters that were read from it, by path.
    initialised: The parameters that it does not hold: adapters.

  Returns:
    A line that names the checkpoint, and a row for each of the three. Bytes are
    those of one copy, on the devices or (if ignored) in files.
  """
  rows = [('', 'arrays', 'values', 'bytes', '')]
  rows.append(('restored', *_sums(restored), _dtypes(restored)))
  initialised = initialised or {}
  rows.append(('initialised', *_sums(initialised), _some(initialised)))
  left = {
    path: math.prod(leaf.shape) * leaf.dtype.itemsize
    for path, leaf in source.leaves.items()
    if path not in restored
  }
  ignored: dict[str, int | None] = {**left, **source.ignored}
  known = [size for size in ignored.values() if size is not None]
  size = format_bytes(sum(known)) if len(known) == len(ignored) else '?'
  rows.append(('ignored', f'{len(ignored):,}', '', size, _some(ignored)))
  table = aligned(rows, right={1, 2, 3})
  return '\n'.join([f'from the {source.where}', *table])


def _sums(arrays: Mapping[str, Shaped]) -> tuple[str, str, str]:
  count = sum(math.prod(x.shape) for x in arrays.values())
  size = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays.values())
  return f'{len(arrays):,}', f'{count:,}', format_bytes(size)


def _dtypes(arrays: Mapping[str, Shaped]) -> str:
  return ', '.join(sorted({x.dtype.name for x in arrays.values()}))


def _some(paths: Iterable[str]) -> str:
  """Lists a few names; if there are many, only their common beginnings.

  state/param_states/encoder/..., state/param_states/decoder/... ->
  state/param_states/...
  """
  names = list(paths)
  if len(names) > SHOWN:
    names = list(dict.fromkeys(_top(name) for name in names))
  more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
  return ', '.join(names[:SHOWN]) + more


def _top(name: str) -> str:
  parts = name.split('/')
  return '/'.join(parts[:2] + ['...']) if len(parts) > 2 else name
