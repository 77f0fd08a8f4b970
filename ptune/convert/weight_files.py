"""The tensors of a Hugging Face directory, as they are stored.

model.safetensors  or shards, and model.safetensors.index.json
pytorch_model.bin  or its shards, if there are no safetensors
"""

from collections.abc import Callable

from etils import epath

from ptune.convert import safetensors_files, torch_files
from ptune.convert.source import Leaf
from ptune.convert.storage import read_json
from ptune.errors import UserError

WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'


def tensors(path: epath.Path) -> tuple[dict[str, Leaf], dict[str, str]]:
  """Returns every tensor of a directory, as stored, and the files' metadata."""
  tensors, metadata = _read_tensors(path)
  if not tensors:
    raise UserError(f'{path} has weights without a single tensor')
  return tensors, metadata


def _read_tensors(
  path: epath.Path,
) -> tuple[dict[str, Leaf], dict[str, str]]:
  names = {child.name for child in path.iterdir()}
  for reader, whole, parts in (
    (safetensors_files.open_file, WEIGHTS, INDEX),
    (torch_files.open_file, torch_files.WEIGHTS, torch_files.INDEX),
  ):
    if whole in names:
      return reader(path / whole)
    if parts in names:
      return _shards(path, path / parts, reader)
  read_json(path / INDEX)  # Raises the error that it is missing.
  raise AssertionError(path)


def _shards(
  path: epath.Path,
  index_file: epath.Path,
  open_file: Callable[[epath.Path], tuple[dict[str, Leaf], dict[str, str]]],
) -> tuple[dict[str, Leaf], dict[str, str]]:
  """Returns the tensors of all files that an index names."""
  index = read_json(index_file)
  where = index.get('weight_map')
  if not isinstance(where, dict) or not all(
    isinstance(file, str) and epath.Path(file).name == file
    for file in where.values()
  ):
    raise UserError(
      f'{index_file} has no valid weight_map; expected one that maps '
      'tensors to files beside it.'
    )
  names = sorted(set(where.values()))
  missing = [file for file in names if not (path / file).exists()]
  if missing:
    raise UserError(
      f'{index_file} names {len(names)} files, and these are missing: '
      f'{", ".join(missing)}. Download them again.'
    )
  opened = {file: open_file(path / file) for file in names}
  shards = {file: tensors for file, (tensors, _) in opened.items()}
  absent = [
    f'  {name} in {file}'
    for name, file in where.items()
    if name not in shards[file]
  ]
  if absent:
    raise UserError(
      f'{index_file} names tensors that their files do not have:\n'
      + '\n'.join(absent)
    )
  metadata = {k: v for _, found in opened.values() for k, v in found.items()}
  return {name: shards[file][name] for name, file in where.items()}, metadata
