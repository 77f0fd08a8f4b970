"""Files of torch (pytorch_model.bin), whose tensors alone are read.

They are pickles. torch.load(weights_only=True) takes tensors from them and
refuses everything else, so that no code of a file is ever run; the values stay
on disk until a slice is read.
"""

import importlib.util
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from ptune.convert.source import Index, Leaf
from ptune.errors import UserError

WEIGHTS = 'pytorch_model.bin'
INDEX = 'pytorch_model.bin.index.json'
DTYPES = ('float64', 'float32', 'float16', 'bfloat16')


def is_installed() -> bool:
  """Whether torch is there to read such files; does not import it."""
  return importlib.util.find_spec('torch') is not None


def open_file(file: epath.Path) -> tuple[dict[str, Leaf], dict[str, str]]:
  """Opens a local file; reads none of its values if it can be mapped.

  Returns:
    Its tensors by name, as they are stored, and no metadata.

  Raises:
    UserError: torch is not installed, the file is damaged or holds something
      else than tensors, or a tensor has a dtype that is not read.
  """
  if not is_installed():
    raise UserError(f'{file} is read by torch: {both_ways(file.parent)}')
  import torch

  try:
    tensors = _load(torch, str(file))
  except UserError:
    raise
  # What it raises for damaged files is of many kinds.
  except Exception as error:
    raise UserError(
      f'{file} is damaged, or holds something else than tensors, which is not'
      f' read: {str(error).splitlines()[0] if str(error) else repr(error)}'
    ) from error
  if not isinstance(tensors, dict):
    raise UserError(f'{file} holds a {type(tensors).__name__}, not tensors')
  unknown = [
    f'  {name}: {getattr(x, "dtype", type(x).__name__)}'
    for name, x in tensors.items()
    if not isinstance(x, torch.Tensor) or _dtype(x) not in DTYPES
  ]
  if unknown:
    raise UserError(
      f'{file} has what is not read (expected tensors of'
      f' {", ".join(DTYPES)}):\n' + '\n'.join(unknown)
    )
  return {name: _leaf(torch, x) for name, x in tensors.items()}, {}


def both_ways(directory: epath.PathLike) -> str:
  """What can be done without torch."""
  return (
    'pip install torch. Or save the model as safetensors where torch and'
    ' transformers are: AutoModelForSeq2SeqLM.from_pretrained('
    f"'{directory}').save_pretrained('...')"
  )


def _load(torch: Any, file: str) -> Any:
  how = {'map_location': 'cpu', 'weights_only': True}
  try:
    return torch.load(file, mmap=True, **how)
  except RuntimeError as error:
    if 'mmap' not in str(error):
      raise
  return torch.load(file, **how)  # Of torch before 1.6: no zip file.


def _dtype(tensor: Any) -> str:
  return str(tensor.dtype).removeprefix('torch.')


def _leaf(torch: Any, tensor: Any) -> Leaf:
  dtype = _dtype(tensor)

  def fetch(index: Index) -> np.ndarray:
    part = tensor.detach()[index].contiguous()
    if dtype == 'bfloat16':  # NumPy has none of its own.
      return part.view(torch.int16).numpy().view(jnp.bfloat16)
    return part.numpy()

  return Leaf(tuple(tensor.shape), jnp.dtype(dtype), fetch)
