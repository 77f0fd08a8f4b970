"""Reads checkpoints of T5X, Hugging Face and ptune through one interface.

    source = open_checkpoint('gs://.../checkpoint_1100000')
    check_config(source, config)
    params = restore(source, abstract)
    print(restore_table(source, params))

`open_checkpoint` detects the format of a directory and returns a `Source`: all
parameters by their T5X names, without their values. `restore` reads the part
that this process's devices hold, and is strict. Each format has a module, which
is imported when a directory of that format is opened. None imports TensorFlow.
"""

import re
from collections.abc import Iterable

from etils import epath

from ptune.convert.hub import locate
from ptune.convert.identity import check_config
from ptune.convert.restore_table import restore_table
from ptune.convert.source import Leaf, Source, restore, sizes, with_rows
from ptune.errors import UserError

__all__ = [
  'Leaf',
  'Source',
  'check_config',
  'open_checkpoint',
  'restore',
  'restore_table',
  'sizes',
  'with_rows',
]

EXPECTED = """\
Expected the directory of one of
  a T5X checkpoint (checkpoint_N: the file `checkpoint` and zarr directories,
    or an Orbax `state`);
  a Hugging Face T5 (config.json and model.safetensors, or its shards and
    model.safetensors.index.json), or hf://org/name for one on the Hub;
  a ptune run (MODEL_DIR with checkpoints/N), or one step of it."""

# Weights in formats of other frameworks.
FOREIGN_WEIGHTS = ('flax_model.msgpack', 'tf_model.h5')
TORCH_WEIGHTS = ('pytorch_model.bin', 'pytorch_model.bin.index.json')


def open_checkpoint(path: epath.PathLike) -> Source:
  """Opens a checkpoint of any supported format; reads only names and shapes.

  Args:
    path: A directory, local or gs://: a T5X checkpoint (msgpack and zarr, or
      Orbax), a Hugging Face directory with safetensors, a ptune MODEL_DIR (its
      newest step is taken) or one of its checkpoints. Or hf://org/name, which
      is downloaded.

  Returns:
    The parameters, by their T5X names.

  Raises:
    FileNotFoundError: `path` does not exist.
    ValueError: `path` is not such a checkpoint, is damaged, or holds a model
      that ptune has no network for.
  """
  path = locate(path)
  if not path.exists():
    raise FileNotFoundError(_absent(path))
  if not path.is_dir():
    raise UserError(f'{path} is a file; give its directory.\n{EXPECTED}')
  names = _listing(path)
  # Orbax before `checkpoint`: older Orbax trees have a file of that name too.
  if {'_METADATA', 'manifest.ocdbt'} & set(names) or (
    'state' in names and (path / 'state').is_dir()
  ):
    from ptune.convert.orbax_state import open_orbax

    return open_orbax(path)
  if 'checkpoint' in names:
    from ptune.convert.t5x import open_t5x

    return open_t5x(path)
  if 'config.json' in names and (
    _has_safetensors(names) or set(TORCH_WEIGHTS) & set(names)
  ):
    from ptune.convert.huggingface import open_huggingface

    return open_huggingface(path)
  if 'checkpoints' in names:
    return open_checkpoint(_newest(path / 'checkpoints'))
  raise UserError(_unrecognised(path, names))


def _listing(path: epath.Path) -> list[str]:
  return sorted(child.name for child in path.iterdir())


def _has_safetensors(names: Iterable[str]) -> bool:
  return any(
    name.endswith(('.safetensors', '.safetensors.index.json')) for name in names
  )


def _newest(checkpoints: epath.Path) -> epath.Path:
  """Returns the highest step; Orbax names an unfinished one differently."""
  names = _listing(checkpoints)
  steps = [name for name in names if name.isdecimal()]
  if not steps:
    raise UserError(
      f'{checkpoints} holds no finished checkpoint: {_shown(names)}. '
      'Was the run stopped before its first one?'
    )
  return checkpoints / max(steps, key=int)


def _shown(names: list[str]) -> str:
  """Lists a directory's names for a message, only the first if too many."""
  if not names:
    return 'it is empty'
  more = f' and {len(names) - 20} more' if len(names) > 20 else ''
  return 'found ' + ', '.join(names[:20]) + more


def _absent(path: epath.Path) -> str:
  """Says that `path` does not exist, and what exists near it."""
  message = f'Nothing is at {path}.'
  # Someone who can read in a bucket may lack the right to list its root.
  parents = [path.parent] if '://' in str(path) else path.parents
  parent = next((p for p in parents if p.exists()), None)
  if parent is not None and parent.is_dir():
    message += f' In {parent}: {_shown(_listing(parent))}.'
  return f'{message}\n{EXPECTED}'


def _unrecognised(path: epath.Path, names: list[str]) -> str:
  """Says what a directory holds instead of a checkpoint, and what to do."""
  found = f'{path} is not a checkpoint: {_shown(names)}.'
  steps = [n for n in names if re.fullmatch(r'(checkpoint_)?\d+', n)]
  if steps:
    candidates = '\n'.join(f'  {path / name}' for name in steps)
    return f'{path} holds checkpoints; give one of them:\n{candidates}'
  foreign = [n for n in names if n in FOREIGN_WEIGHTS]
  if foreign:
    return (
      f'{found}\nptune does not read {foreign[0]}; save it as safetensors: '
      "AutoModelForSeq2SeqLM.from_pretrained('...').save_pretrained('...')."
    )
  if 'config.json' in names and str(path.parent.name) == 'snapshots':
    from ptune.convert.torch_files import both_ways

    return (
      f'{found}\nOn the Hub, this model has no safetensors, and no pull request'
      " of the Hub's bot adds them. torch can read its files:"
      f' {both_ways(path)}'
    )
  if 'adapter_config.json' in names:
    return (
      f'{found}\nThis is a PEFT adapter; its adapter_config.json names its '
      'base model.'
    )
  return f'{found}\n{EXPECTED}'
