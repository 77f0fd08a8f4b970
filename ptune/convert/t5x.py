"""T5X checkpoints of the older layout, as the public ones are.

    checkpoint_1100000/
      checkpoint                               msgpack: names, small arrays
      target.encoder.layers_0.mlp.wo.kernel/   zarr, one directory a leaf
      state.param_states. ...                  optimizer state, never read

In the msgpack, a leaf in zarr is a TensorStore spec whose path is relative to
the checkpoint. If it was written on Google Cloud, the spec has a `gcs` driver
and a placeholder for the bucket.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import serialization, traverse_util

from ptune.convert.scanned import unrolled
from ptune.convert.source import Leaf, Shape, Source
from ptune.convert.zarr import (
  file_store,
  open_arrays,
  subdirectory,
  write_array,
)
from ptune.errors import UserError
from ptune.host import paths

# Version 2 wrote bfloat16 as uint16; version 0 had no optimizer around it.
VERSIONS = (2, 3)


def open_t5x(path: epath.Path) -> Source:
  """Opens a directory with T5X's msgpack file `checkpoint`.

  Raises:
    ValueError: A file is damaged or missing, or the layout differs.
  """
  file = path / 'checkpoint'
  optimizer = _optimizer(file)
  leaves, specs, stores = {}, {}, {}
  for name, node in _flatten(optimizer['target']).items():
    if isinstance(node, np.ndarray):
      leaves[name] = Leaf(node.shape, node.dtype, node.__getitem__)
      continue
    where = f'{name} of {file}'
    specs[name] = _shape_and_dtype(node, where)
    directory = subdirectory(path, _relative_path(node, where))
    stores[name] = file_store(directory)
  arrays = open_arrays(path, stores)
  _compare(specs, arrays, path)
  leaves |= arrays
  return Source(
    path=str(path),
    kind='t5x',
    step=_step(optimizer, file),
    leaves=unrolled(path, leaves),
    ignored={
      f'{key}/{name}': _bytes(node)
      for key, tree in optimizer.items()
      if key != 'target' and isinstance(tree, dict)
      for name, node in _flatten(tree).items()
      if node is not None and f'{key}/{name}' != 'state/step'
    },
  )


def write_t5x(
  directory: epath.Path,
  leaves: Mapping[str, Leaf],
  step: int = 0,
  trained: Collection[str] = (),
) -> None:
  """Writes a checkpoint as T5X does, one array at a time.

  Args:
    directory: An empty directory.
    leaves: The parameters, by path.
    step: The training step.
    trained: The parameters that a T5X optimizer would train. They get
      Adafactor's state before its first step. The others get None, as in T5X's
      MultiOptimizer.
  """
  target, states = {}, {}
  for path, leaf in leaves.items():
    name = f'target.{path.replace("/", ".")}'
    spec = write_array(directory / name, leaf)
    spec['kvstore'] = {'driver': 'file', 'path': f'{name}/'}
    target[path] = spec
    states[path] = _adafactor(leaf.shape) if path in trained else None
  state: dict[str, Any] = {'step': np.asarray(step, np.int32)}
  state['param_states'] = traverse_util.unflatten_dict(states, sep='/')
  tree = {'target': traverse_util.unflatten_dict(target, sep='/')}
  (directory / 'checkpoint').write_bytes(
    serialization.msgpack_serialize(
      {'version': VERSIONS[-1], 'optimizer': {**tree, 'state': state}}
    )
  )


def _adafactor(shape: Shape) -> dict[str, np.ndarray]:
  """Returns T5X's second moments of a parameter: factored from 128 x 128 on."""
  unused = np.zeros((1,), np.float32)
  if len(shape) == 2 and min(shape) >= 128:
    # By T5X's heuristic the shorter axis is the row, wherever it is.
    row, column = (np.zeros((n,), np.float32) for n in sorted(shape))
    return {'m': unused, 'v': unused, 'v_row': row, 'v_col': column}
  full = np.zeros(shape, np.float32)
  return {'m': unused, 'v': full, 'v_row': unused, 'v_col': unused}


def _optimizer(file: epath.Path) -> dict[str, Any]:
  """Returns the msgpack file's {'target': ..., 'state': ...}."""
  paths.check_file(file)
  data = file.read_bytes()
  if data.startswith(b'model_checkpoint_path'):
    raise UserError(
      f'{file} belongs to a checkpoint of TensorFlow (Mesh TensorFlow T5); '
      'find the same models converted to T5X in '
      'gs://t5-data/pretrained_models/t5x.'
    )
  try:
    contents = serialization.msgpack_restore(data)
  except Exception as error:  # Damaged files make msgpack raise any error.
    raise UserError(
      f'{file} ({len(data)} bytes) is not the msgpack file of a T5X '
      f'checkpoint, or is cut short; copy it again. {error}'
    ) from error
  keys = sorted(contents) if isinstance(contents, dict) else type(contents)
  optimizer = contents.get('optimizer') if isinstance(contents, dict) else None
  if not isinstance(optimizer, dict) or not isinstance(
    optimizer.get('target'), dict
  ):
    raise UserError(
      f"{file} holds {keys}; expected T5X's version and optimizer/target."
    )
  if contents.get('version') not in VERSIONS:
    raise UserError(
      f'{file} has version {contents.get("version")}; ptune reads '
      f'{VERSIONS}. Load and save it with T5X once.'
    )
  return optimizer


def _is_spec(node: Any) -> bool:
  """Returns whether a dict is the spec of a TensorStore array."""
  return isinstance(node, dict) and isinstance(node.get('driver'), str)


def _flatten(tree: dict[str, Any]) -> dict[str, Any]:
  return traverse_util.flatten_dict(
    tree, sep='/', is_leaf=lambda _, node: _is_spec(node)
  )


def _relative_path(node: Any, where: str) -> Any:
  """Returns the path of an array in a spec.

  The spec is {driver: zarr, kvstore: {driver: file, path: 'target.a.kernel/'},
  ...} or, in TensorStore's form of 2021, {driver: zarr, kvstore: {...},
  path: ...}.
  """
  kvstore = node.get('kvstore') if _is_spec(node) else None
  if not isinstance(kvstore, dict) or node['driver'] != 'zarr':
    raise UserError(
      f'{where} is {str(node)[:200]}; expected an array or the TensorStore '
      'spec of a zarr array.'
    )
  if kvstore.get('driver') not in ('file', 'gfile', 'gcs'):
    raise UserError(
      f'{where} is in a {kvstore.get("driver")!r} store; expected file, '
      'gfile or gcs.'
    )
  return kvstore.get('path', node.get('path'))


def _shape_and_dtype(node: Any, where: str) -> tuple[Shape, str]:
  """Returns the shape and dtype of a zarr array in the msgpack file."""
  try:
    metadata = node['metadata']
    shape = tuple(int(n) for n in metadata['shape'])
    dtype = str(node.get('dtype') or jnp.dtype(metadata['dtype']).name)
  except (TypeError, KeyError, ValueError, AttributeError) as error:
    raise UserError(
      f'{where} has no proper shape and dtype: {str(node)[:200]}'
    ) from error
  if dtype == 'uint16':
    raise UserError(
      f'{where} is bfloat16 written as uint16, as T5X did before June 2021; '
      'load and save the checkpoint with T5X once.'
    )
  return shape, dtype


def _bytes(node: Any) -> int | None:
  """Returns the bytes of an array of the optimizer state, from its spec."""
  if isinstance(node, np.ndarray):
    return node.nbytes
  try:
    shape, dtype = _shape_and_dtype(node, '')
    return math.prod(shape) * jnp.dtype(dtype).itemsize
  except (ValueError, TypeError):
    return None


def _compare(
  specs: dict[str, tuple[Shape, str]],
  arrays: dict[str, Leaf],
  path: epath.Path,
) -> None:
  """Raises an error if the zarr directories do not match the msgpack file."""
  wrong = [
    f'  {name}: {array.dtype.name} {list(array.shape)}, expected {dtype} '
    f'{list(shape)}'
    for name, array in arrays.items()
    for shape, dtype in [specs[name]]
    if (array.shape, array.dtype.name) != (shape, dtype)
  ]
  if wrong:
    raise UserError(
      f'{path}: arrays differ from their description in the file `checkpoint`; '
      'they do not belong together, copy it again.\n' + '\n'.join(wrong)
    )


def _step(optimizer: dict[str, Any], file: epath.Path) -> int | None:
  state = optimizer.get('state')
  step = state.get('step') if isinstance(state, dict) else None
  if step is None:
    return None
  step = np.asarray(step)
  if step.size != 1 or not np.issubdtype(step.dtype, np.integer):
    raise UserError(f'The step in {file} is {step}; expected one integer.')
  return int(step.item())
