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

SUFFIX = '.safetensors'


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
  beside = file.with_suffix('.json')
  facts = read_json(beside) if beside.is_file() else {}
  return Source(str(file), 'safetensors', facts.get('step'), leaves), facts
