"""Prompt files: finds, reads, checks and writes them.

MODEL_DIR of ptune, its prompts/, one .npy   the best, else the newest
MODEL_DIR of the paper's implementation      numpy_checkpoints/checkpoint_N
a PEFT adapter                               see `peft`
a .safetensors file                          written by `ptune export`
a checkpoint of T5X or ptune                 encoder/prompt/prompt/prompt
"""

import dataclasses
import io
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from ptune.convert import open_checkpoint, peft, safetensors_files
from ptune.convert.hub import locate
from ptune.convert.trained import SUFFIX, facts_beside, open_trained
from ptune.errors import UserError
from ptune.host import paths
from ptune.host.files import write_atomically
from ptune.methods import multitask, prompt_array, smop
from ptune.methods.prompt import PATH
from ptune.methods.prompt_array import read_array
from ptune.methods.smop import Routed

# The name of the prompt's file in the paper's implementation.
REFERENCE_FILE = 'encoder.prompt.prompt.prompt'
REFERENCE_DIRECTORY = 'numpy_checkpoints'
# The names of a run's files in prompts/.
_BEST = ('best.npy', 'best.safetensors')
_STEP = re.compile(r'step_(\d{1,15})\.(npy|safetensors)')
# The metadata key for facts about the prompt in a .safetensors file.
FACTS = 'ptune'
# The contents of such files: one prompt, or several made by `multitask`.
ONE, SEVERAL = {peft.ROWS}, {multitask.SHARED, multitask.TASKS}

EXPECTED = """\
Expected a prompt: a .npy file, the MODEL_DIR of a run (ptune's, or the paper's
implementation's with numpy_checkpoints/), a PEFT adapter, a .safetensors file
of ptune export, or a checkpoint of T5X or ptune that holds a prompt. (A whole
model goes out by ptune convert.)"""


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt, and the facts about it.

  Attributes:
    array: [prompt, embed] float32.
    path: The file or directory that it was read from.
    kind: 'npy', 'peft', 'safetensors', or the kind of a checkpoint.
    facts: As in `prompts/step_N.json`: step, task, scores, base (the
      fingerprint of the model it was trained on), method. Unknown facts are
      absent. `t5x_step` is T5X's step, which includes the base's steps.
    notes: What a user should know about how it was read.
  """

  array: np.ndarray
  path: str
  kind: str
  facts: dict[str, Any]
  notes: tuple[str, ...] = ()


def read_prompt(path: epath.PathLike, task: int | None = None) -> Prompt:
  """Reads a prompt of any supported format.

  Args:
    path: See the module. For a run, it takes the best prompt, or the newest if
      none was evaluated.
    task: The task whose prompt to read, for a multi-task run or PEFT adapter.

  Raises:
    FileNotFoundError: `path` does not exist.
    ValueError: There is no prompt, or its file is damaged.
  """
  place = find(path)
  notes: list[str] = []
  if (place / peft.CONFIG).exists():
    kind, (array, facts, notes) = 'peft', peft.read_peft(place, task)
  elif is_multitask(place):
    kind, (array, facts) = 'safetensors', _of_task(place, task)
  elif task is not None:
    raise UserError(
      f'{place} is one prompt, not one for each task; leave out --task'
    )
  elif place.is_dir():
    kind, array, facts = _of_checkpoint(place)
  elif place.suffix == '.safetensors':
    kind, (array, facts) = 'safetensors', _of_safetensors(place)
  else:
    kind, array, facts = 'npy', _of_npy(place), _beside(place)
  array = _checked(array, place)
  return Prompt(array, str(place), kind, facts, tuple(notes))


def read_routed(path: epath.PathLike) -> tuple[Routed, dict[str, Any]] | None:
  """The prompts and the router of SMoP, and facts; None if it is not SMoP's.

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: the file is damaged.
  """
  place = find(path)
  if place.suffix != SUFFIX or place.is_dir():
    return None
  if smop.PATH not in safetensors_files.open_file(place)[0]:
    return None
  source, facts = open_trained(place)
  if set(source.leaves) != {smop.PATH, smop.ROUTER}:
    raise UserError(
      f'{place} holds {sorted(source.leaves)[:20]}; expected what SMoP trains,'
      f' {smop.PATH} and {smop.ROUTER}'
    )
  prompts, router = (
    np.asarray(source.leaves[name].read(), np.float32)
    for name in (smop.PATH, smop.ROUTER)
  )
  if (
    prompts.ndim != 2
    or router.ndim != 2
    or not router.size
    or router.shape[0] != prompts.shape[1]
    or len(prompts) % router.shape[1]
  ):
    raise UserError(
      f'{place} holds prompts {list(prompts.shape)} and a router'
      f' {list(router.shape)}; expected [prompts * prompt, embed] and [embed,'
      ' prompts]'
    )
  shape = router.shape[1], -1, prompts.shape[1]
  return Routed(prompts.reshape(shape), router), facts


def write_prompt(
  file: epath.Path, array: np.ndarray, facts: Mapping[str, Any]
) -> None:
  """Writes NAME.npy, and NAME.json with the facts about it.

  Each file is complete or absent. The facts come first, so a prompt never
  exists without them.
  """
  facts = {**facts, 'prompt_length': array.shape[0]}
  write_atomically(
    file.with_suffix('.json'), json.dumps(facts, indent=2) + '\n'
  )
  write_atomically(file, npy(array))


def npy(array: np.ndarray) -> bytes:
  """Returns an array as the contents of a .npy file."""
  buffer = io.BytesIO()
  np.save(buffer, array)
  return buffer.getvalue()


def read_rows(path: epath.PathLike) -> np.ndarray:
  """Returns the rows of a PROMPT_FILE, [prompt, embed]: see `read_prompt`."""
  place = locate(path)
  if place.is_dir() or place.suffix == '.safetensors':
    return read_prompt(place).array
  return prompt_array.read(place)


def find(path: epath.PathLike) -> epath.Path:
  """Returns a prompt's path: MODEL_DIR -> MODEL_DIR/prompts/best.npy.

  The result is a file, a PEFT adapter, or another directory, which can only be
  a checkpoint.

  Raises:
    FileNotFoundError: `path` does not exist.
    ValueError: It has nothing that could be a prompt.
  """
  path = locate(path)
  if not path.exists():
    suffixed = epath.Path(f'{path}.npy')
    if suffixed.is_file():
      return suffixed
    found = []
    if path.parent.is_dir():
      found = sorted(child.name for child in path.parent.iterdir())
    raise FileNotFoundError(
      f'Nothing is at {path}. In {path.parent}: '
      f'{", ".join(found[:20]) or "nothing"}'
    )
  if not path.is_dir():
    paths.check_file(path, 'the prompt')
    return path
  names = {child.name for child in path.iterdir()}
  if peft.CONFIG in names:
    return path
  if 'prompts' in names and (written := _written(path / 'prompts')):
    return written
  if written := _written(path):
    return written
  if REFERENCE_FILE in names:
    return path / REFERENCE_FILE
  folder = path / REFERENCE_DIRECTORY if REFERENCE_DIRECTORY in names else path
  steps = {
    int(match[1]): child / REFERENCE_FILE
    for child in folder.iterdir()
    if (match := re.fullmatch(r'checkpoint_(\d{1,15})', child.name))
    and (child / REFERENCE_FILE).is_file()
  }
  return steps[max(steps)] if steps else path


def name_of(path: epath.Path) -> str:
  """Returns a default name for a prompt."""
  return path.stem if path.suffix in ('.npy', SUFFIX) else path.name


def is_of_a_run(file: epath.Path) -> bool:
  """Returns whether a file is named like those in a run's `prompts/`."""
  return file.name in _BEST or bool(_STEP.fullmatch(file.name))


def _written(folder: epath.Path) -> epath.Path | None:
  """Returns the best file of a `prompts/` directory, or its newest."""
  for best in _BEST:
    if (folder / best).is_file():
      return folder / best
  steps = {
    int(match[1]): child
    for child in folder.iterdir()
    if (match := _STEP.fullmatch(child.name))
  }
  return steps[max(steps)] if steps else None


def _beside(file: epath.Path) -> dict[str, Any]:
  """Returns the facts about the prompt in a NumPy file."""
  if facts := facts_beside(file):
    return facts
  match = re.fullmatch(r'checkpoint_(\d{1,15})', file.parent.name)
  return {'t5x_step': int(match[1])} if match else {}


def _of_checkpoint(path: epath.Path) -> tuple[str, np.ndarray, dict[str, Any]]:
  source = open_checkpoint(path)
  if PATH not in source.leaves:
    others = sorted(name for name in source.leaves if 'prompt' in name)
    raise UserError(
      f'The {source.describe()} holds no {PATH}.'
      + ''.join(f'\n  it holds {name}' for name in others[:20])
      + f'\n{EXPECTED}'
    )
  step = 'step' if source.kind == 'ptune' else 't5x_step'
  facts = {} if source.step is None else {step: source.step}
  return source.kind, source.leaves[PATH].read(), facts


def is_multitask(file: epath.Path) -> bool:
  """Returns whether a file holds the prompts of several tasks."""
  if file.suffix != SUFFIX or file.is_dir():
    return False
  return set(safetensors_files.open_file(file)[0]) == SEVERAL


def _of_task(
  file: epath.Path, task: int | None
) -> tuple[np.ndarray, dict[str, Any]]:
  source, facts = open_trained(file)
  trained = {path: leaf.read() for path, leaf in source.leaves.items()}
  settings = facts.pop('settings', None)
  if settings is None:
    raise UserError(
      f'{file} holds the prompts of several tasks; it needs the .json that a'
      ' run wrote beside it, which says how they are composed'
    )
  try:
    array = multitask.task_prompt(settings, trained, task)
  except ValueError as error:
    raise UserError(f'{file}: {error}, with --task') from error
  method = 'prompt/causal' if settings['causal'] else 'prompt'
  return array, {**facts, 'method': method, 'task_index': task}


def _of_safetensors(file: epath.Path) -> tuple[np.ndarray, dict[str, Any]]:
  tensors, metadata = safetensors_files.open_file(file)
  if smop.PATH in tensors:
    raise UserError(
      f'{file} holds several prompts and a router, which picks one by the'
      ' input; a prompt for another program is the same for all inputs. Use the'
      ' file in a bank, or as PROMPT_FILE with methods/smop.gin'
    )
  if set(tensors) != ONE:
    more = f' and {len(tensors) - 3} more' if len(tensors) > 3 else ''
    raise UserError(
      f'{file} holds {sorted(tensors)[:3]}{more}; a prompt file holds only '
      f'{peft.ROWS}. Use a file of another method as PROMPT_FILE, or merge it '
      'with ptune export --format=t5x or huggingface'
    )
  try:
    facts = json.loads(metadata.get(FACTS, '{}'))
  except (ValueError, RecursionError):
    facts = None
  if not isinstance(facts, dict):
    raise UserError(f'{file}: its metadata {FACTS!r} is not a JSON object')
  return tensors[peft.ROWS].read(), facts


def _of_npy(file: epath.Path) -> np.ndarray:
  """Reads NumPy's format, whatever the file's suffix; never a pickle."""
  try:
    return read_array(file)
  except UserError as error:
    raise UserError(f'{error}.\n{EXPECTED}') from error


def _checked(array: np.ndarray, place: epath.Path) -> np.ndarray:
  """Returns the array as float32; raises ValueError if it is not a prompt."""
  kind = array.dtype
  numbers = np.issubdtype(kind, np.floating) or kind.name == 'bfloat16'
  if array.ndim != 2 or not numbers or 0 in array.shape:
    raise UserError(
      f'{place} holds {kind} {list(array.shape)}; a prompt is [prompt, embed] '
      'floats'
    )
  # Values too large for float32 become infinite, and are reported as such.
  with np.errstate(over='ignore'):
    array = np.ascontiguousarray(array, np.float32)
  if not np.isfinite(array).all():
    raise UserError(f'{place} holds NaN or infinity')
  return array
