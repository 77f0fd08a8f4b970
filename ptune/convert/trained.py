"""A method's trained parameters in one file: `prompts/step_N.safetensors`.

Methods that train something other than one prompt use it. It holds parameters
by their paths, in float32. The .json beside it holds the facts: method and
settings, the fingerprint of the base, task, step, scores.
"""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from ptune.convert import safetensors_files
from ptune.convert.source import Leaf, Source
from ptune.convert.storage import read_json
from ptune.errors import UserError

SUFFIX = '.safetensors'
# Facts that other code relies on, in the .json beside it; all may be absent.
_FACTS = {
  'method': str,
  'settings': dict,
  'step': int,
  't5x_step': int,
  'task': str,
  'scores': dict,
}


def dump(trained: Mapping[str, np.ndarray]) -> bytes:
  """Returns the bytes of such a file.

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
    The parameters, and the facts in the .json beside it, or {}.

  Raises:
    FileNotFoundError: The file does not exist.
    ValueError: The file is damaged.
  """
  file = epath.Path(path)
  if not file.is_file():
    raise FileNotFoundError(f'there is no file {file}')
  leaves, _ = safetensors_files.open_file(file)
  facts = facts_beside(file)
  return Source(str(file), 'safetensors', facts.get('step'), leaves), facts


def facts_beside(file: epath.Path) -> dict[str, Any]:
  """Returns the facts in the .json that a run wrote beside a file, or {}.

  Raises:
    UserError: If it is not a JSON object, or a fact has a wrong type.
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
