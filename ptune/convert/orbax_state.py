"""Orbax PyTrees: T5X's newer checkpoints, and ptune's own.

    checkpoint_1100010/state/        {target: parameters, state: step, ...}
    MODEL_DIR/checkpoints/N/state/   {step, trainable: parameters, opt_state}

`_METADATA` names the leaves; TensorStore opens and reads those we want. Orbax
itself can give their shapes too. But it opens all leaves, including the
optimizer state, and reports damage from several threads at once.
"""

import json
from typing import Any

from etils import epath

from ptune.convert.scanned import unrolled
from ptune.convert.source import Source
from ptune.convert.zarr import file_store, open_arrays, subdirectory
from ptune.errors import UserError
from ptune.host import paths

# The paths of the parameters and the step in the tree, by kind of checkpoint.
LAYOUTS = {
  't5x_orbax': ('target', ('state', 'step')),
  'ptune': ('trainable', ('step',)),
}


def open_orbax(path: epath.Path) -> Source:
  """Opens an Orbax PyTree at `path`, or at `path`/state, where items are.

  Raises:
    ValueError: The files are damaged, or the tree is neither T5X's nor ptune's.
  """
  item = path / 'state' if (path / 'state').is_dir() else path
  metadata = _metadata(item)
  keys = _keys(metadata, item)
  tops = {key[0] for key in keys}
  kind = next((k for k, (top, _) in LAYOUTS.items() if top in tops), None)
  if kind is None:
    raise UserError(
      f'{item} is an Orbax tree of {sorted(tops)}; expected target and state '
      '(T5X), or step, trainable and opt_state (ptune).'
    )
  top, step = LAYOUTS[kind]
  wanted = [key for key in keys if key[0] == top or key == step]
  ocdbt = metadata.get('use_ocdbt')
  if ocdbt is None:
    ocdbt = (item / 'manifest.ocdbt').exists()
  arrays = open_arrays(
    item,
    {_name(key): _store(item, _name(key), ocdbt) for key in wanted},
    driver='zarr3' if metadata.get('use_zarr3') else 'zarr',
    zeros_are_stored=bool(metadata.get('store_array_data_equal_to_fill_value')),
  )
  leaves = {
    '/'.join(key[1:]): arrays[_name(key)] for key in wanted if key != step
  }
  if kind != 'ptune':  # A run has one set of parameters for each layer.
    leaves = unrolled(path, leaves)
  return Source(
    path=str(path),
    kind=kind,
    step=int(arrays[_name(step)].read().item()) if step in wanted else None,
    leaves=leaves,
    # Their shapes are known, but not their dtypes.
    ignored={'/'.join(key): None for key in keys if key not in wanted},
  )


def _name(key: tuple[str, ...]) -> str:
  """Returns Orbax's name of a leaf: ('target', 'a') -> target.a."""
  return '.'.join(key)


def _store(item: epath.Path, name: str, ocdbt: bool) -> dict[str, Any]:
  if not ocdbt:
    return file_store(subdirectory(item, name))
  return {'driver': 'ocdbt', 'base': file_store(item), 'path': f'{name}/'}


def _metadata(item: epath.Path) -> dict[str, Any]:
  file = item / '_METADATA'
  if not file.exists():
    found = sorted(child.name for child in item.iterdir())
    raise UserError(
      f'{file} is missing, so this is not a complete Orbax PyTree; copy it '
      f'again if it was one. Found: {", ".join(found) or "nothing"}.'
    )
  paths.check_file(file)
  try:
    return dict(json.loads(file.read_text()))
  except (ValueError, TypeError, RecursionError) as error:
    raise UserError(
      f'{file} is damaged or cut short; copy it again. {error}'
    ) from error


def _keys(metadata: dict[str, Any], item: epath.Path) -> list[tuple[str, ...]]:
  """Returns the path of each leaf with data; None and empty nodes have none."""
  try:
    return [
      tuple(str(part['key']) for part in entry['key_metadata'])
      for entry in metadata['tree_metadata'].values()
      if not entry['value_metadata'].get('skip_deserialize')
    ]
  except (KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f'{item / "_METADATA"} has an unknown format ({error!r}); did a newer '
      'Orbax write the checkpoint?'
    ) from error
