"""`ptune inspect`: describes a file or directory, in a few lines or as JSON."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from ptune.convert import identity, open_checkpoint, peft, prompts
from ptune.convert.hub import locate
from ptune.convert.safetensors_files import open_file
from ptune.convert.source import Leaf, Source, nbytes
from ptune.convert.storage import read_json
from ptune.convert.trained import SUFFIX, open_trained
from ptune.model.model_info import format_bytes

RUN_FILE = 'run.json'
# Facts of a run or a prompt to show, in this order.
SHOWN = (
  'task',
  'method',
  'step',
  't5x_step',
  'scores',
  'base',
  'base_model',
  'initial_checkpoint_path',
  'peft_type',
  'read_from',
)


def inspect(
  path: epath.PathLike, *, fingerprint: bool = False
) -> dict[str, Any]:
  """Describes the content of a path; reads no more than necessary.

  Args:
    path: A checkpoint, a run, a prompt, an adapter, or hf://org/name.
    fingerprint: Whether to read a whole base model for its fingerprint.

  Returns:
    `path`, `kind`, and those that apply of: `model` (published names that fit),
    `config`, `parameters`, `arrays`, `bytes`, `dtypes`, `step`, `prompt`
    (`length`, `width`, `file` and statistics), `base` (fingerprint), `task`,
    `method`, `scores`, `checkpoints` (steps), `tensors`, `notes`.

  Raises:
    FileNotFoundError: `path` does not exist.
    ValueError: ptune does not know the format, or it is damaged.
  """
  whole = locate(path)
  place = prompts.find(whole)
  found: dict[str, Any] = {'path': str(path)}
  if whole.is_dir() and (whole / RUN_FILE).exists():
    return found | _run(whole, place)
  if (place / peft.CONFIG).exists():
    return found | _adapter(place)
  if place.is_dir():
    return found | _checkpoint(place, fingerprint)
  return found | _file(place)


def _file(place: epath.Path) -> dict[str, Any]:
  """Describes one file: a prompt, or another method's parameters."""
  if place.suffix == SUFFIX and set(open_file(place)[0]) != prompts.ONE:
    source, facts = open_trained(place)
    return {'kind': 'safetensors', **_tensors(source.leaves), **_shown(facts)}
  return _prompt(place)


def _prompt(place: epath.Path) -> dict[str, Any]:
  prompt = prompts.read_prompt(place)
  norms = np.linalg.norm(prompt.array, axis=1)
  found = {
    'kind': f'prompt ({prompt.kind})',
    'parameters': prompt.array.size,
    'prompt': {
      'length': prompt.array.shape[0],
      'width': prompt.array.shape[1],
      'file': prompt.path,
      'mean_row_norm': float(norms.mean()),
      'largest_value': float(np.abs(prompt.array).max()),
    },
    **_shown(prompt.facts),
  }
  return found | ({'notes': list(prompt.notes)} if prompt.notes else {})


def _adapter(place: epath.Path) -> dict[str, Any]:
  config = read_json(place / peft.CONFIG)
  kind = str(config.get('peft_type'))
  if kind in ('PROMPT_TUNING', 'P_TUNING'):
    return _prompt(place)
  # We read no more of other kinds.
  file = place / peft.WEIGHTS
  tensors = open_file(file)[0] if file.exists() else {}
  found = {'kind': f'PEFT adapter ({kind})', **_tensors(tensors)}
  base = config.get('base_model_name_or_path')
  if base:
    found['base_model'] = str(base)
  if kind == 'MULTITASK_PROMPT_TUNING':
    found['prompt'] = {
      'length': config.get('num_virtual_tokens'),
      'width': config.get('token_dim'),
      'tasks': config.get('num_tasks'),
    }
  return found


def _run(directory: epath.Path, place: epath.Path) -> dict[str, Any]:
  run = read_json(directory / RUN_FILE)
  found: dict[str, Any] = {'kind': 'run of ptune', **_shown(run)}
  if not place.is_dir():
    found |= {**_file(place), 'kind': 'run of ptune'}
    if 'initial_checkpoint_path' in run:
      found['initial_checkpoint_path'] = run['initial_checkpoint_path']
  folder = directory / 'checkpoints'
  if folder.is_dir():
    names = [child.name for child in folder.iterdir()]
    found['checkpoints'] = sorted(int(n) for n in names if n.isdecimal())
    if place.is_dir() and found['checkpoints']:
      source = open_checkpoint(directory)
      found |= {**_model(source, False), 'kind': 'run of ptune'}
  return found


def _checkpoint(place: epath.Path, fingerprint: bool) -> dict[str, Any]:
  names = [child.name for child in place.iterdir()]
  steps = [
    int(match[1])
    for name in names
    if (match := re.fullmatch(r'(?:checkpoint_)?(\d{1,15})', name))
  ]
  if steps and 'checkpoint' not in names and 'state' not in names:
    return {'kind': 'directory of checkpoints', 'checkpoints': sorted(steps)}
  return _model(open_checkpoint(place), fingerprint)


def _model(source: Source, fingerprint: bool) -> dict[str, Any]:
  """Describes a checkpoint."""
  base = identity.base_leaves(source)
  facts = identity.facts(source)
  found: dict[str, Any] = {'kind': f'{source.kind} checkpoint'}
  if source.step is not None:
    found['step'] = source.step
  if base:
    found['model'] = identity.names(facts)
    found['config'] = {k: _plain(v) for k, v in facts.items()}
  found |= _tensors(base or source.leaves)
  beyond = {k: v for k, v in source.leaves.items() if base and k not in base}
  if prompts.PATH in source.leaves:
    length, width = (*source.leaves[prompts.PATH].shape, None, None)[:2]
    found['prompt'] = {'length': length, 'width': width}
    beyond.pop(prompts.PATH, None)
  if beyond:
    found['adapters'] = {k: list(v.shape) for k, v in sorted(beyond.items())}
  if source.ignored:
    found['ignored'] = len(source.ignored)
  if fingerprint and base:
    found['base'] = identity.fingerprint(source)
  return found


def _plain(value: Any) -> Any:
  """Converts a fact to a JSON value."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return {k: _plain(v) for k, v in dataclasses.asdict(value).items()}
  return list(value) if isinstance(value, tuple) else value


def _tensors(leaves: Mapping[str, Leaf]) -> dict[str, Any]:
  return {
    'parameters': sum(math.prod(x.shape) for x in leaves.values()),
    'arrays': len(leaves),
    'bytes': sum(map(nbytes, leaves.values())),
    'dtypes': sorted({x.dtype.name for x in leaves.values()}),
  }


def _shown(facts: Mapping[str, Any]) -> dict[str, Any]:
  return {key: facts[key] for key in SHOWN if facts.get(key) is not None}


def text(found: Mapping[str, Any]) -> str:
  """Formats the result of `inspect`, one fact a line."""
  rows = []
  for key, value in found.items():
    if key == 'model':
      value = ' or '.join(value) or 'no published size'
    elif key == 'bytes':
      value = format_bytes(value)
    elif key in ('parameters', 'arrays'):
      value = f'{value:,}'
    elif key == 'notes':
      value = '; '.join(value)
    elif key == 'scores':
      value = _scores(value)
    rows.append((key, _flat(value)))
  width = max(len(key) for key, _ in rows)
  return '\n'.join(f'{key.ljust(width)}  {value}' for key, value in rows)


def _flat(value: Any) -> str:
  if isinstance(value, Mapping):
    return ', '.join(f'{k} {_flat(v)}' for k, v in value.items())
  if isinstance(value, list | tuple):
    return ', '.join(map(_flat, value))
  return f'{value:.6g}' if isinstance(value, float) else str(value)


def _scores(scores: Any) -> str:
  """{'task': {'accuracy': 0.5}} -> 'task: accuracy 0.5'."""
  if not isinstance(scores, Mapping):
    return str(scores)
  return '; '.join(
    f'{task}: {_flat(values)}' for task, values in scores.items()
  )
