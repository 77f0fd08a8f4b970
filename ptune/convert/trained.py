"""What a method trained, as one file: `prompts/step_N.safetensors` of a run.

Of methods that train something else than one prompt. The parameters lie there
by their paths, float32; what is known of them stands in the .json beside:
method and settings, the fingerprint of the base, task, step, scores.
"""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from ptune.convert import safetensors_files
from ptune.convert.huggingface import read_json
from ptune.convert.source import Leaf, Source
from ptune.errors import UserError

SUFFIX = '.safetensors'
# The facts that others rely on, in the .json beside it; all may be absent.
_FACTS = {
  'method': str,
  'settings': dict,
  'step': int,
  't5x_step': int,
  'task': str,
  'scores': dict,
}


def dump(trained: Mapping[str, np.ndarray]) -> bytes:
  """The bytes of such a file.

  Args:
    trained: The parameters, by path.
  """
  arrays = {path: np.asarray(x, np.float32) for path, x in trained.items()}
  file = io.BytesIO()
  safetensors_files.write(
    file,
    {
      path: Leaf(array.shape, array.dtype, array.__getitem__)
      for path, array in arrays.items()
    },
    {},
  )
  return file.getvalue()


def open_trained(path: epath.PathLike) -> tuple[Source, dict[str, Any]]:
  """Opens such a file.

  Returns:
    The parameters, and what stands in the .json beside, {} without one.

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: the file is damaged.
  """
  file = epath.Path(path)
  if not file.is_file():
    raise FileNotFoundError(f'there is no file {file}')
  leaves, _ = safetensors_files.open_file(file)
  facts = facts_beside(file)
  return Source(str(file), 'safetensors', facts.get('step'), leaves), facts


def facts_beside(file: epath.Path) -> dict[str, Any]:
  """What the .json says that a run wrote beside what it trained; {} without.

  Raises:
    UserError: If it is no JSON object, or a fact has another type.
  """
  stem = file.name.removesuffix('.npy').removesuffix(SUFFIX)
  beside = file.with_name(f'{stem}.json')
  if not beside.exists():
    return {}
  facts = read_json(beside)
  wrong = [
    f'{name} is {facts[name]!r}, expected {kind.__name__}'
    for name, kind in _FACTS.items()
    if facts.get(name) is not None and type(facts[name]) is not kind
  ]
  if wrong:
    raise UserError(f'{beside} is damaged: {"; ".join(wrong)}')
  return facts
