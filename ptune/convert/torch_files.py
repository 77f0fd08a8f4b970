"""torch's files (pytorch_model.bin), from which we read only tensors.

They are pickles. torch.load(weights_only=True) reads tensors and refuses
everything else, so code in a file never runs. The values stay on disk until a
slice is read.
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
  """Returns whether torch is installed; does not import it."""
  return importlib.util.find_spec('torch') is not None


def open_file(file: epath.Path) -> tuple[dict[str, Leaf], dict[str, str]]:
  """Opens a local file; reads no values if the file can be mapped.

  Returns:
    Its tensors by name, as stored, and no metadata.

  Raises:
    UserError: torch is not installed, the file is damaged or holds something
      other than tensors, or a tensor has an unsupported dtype.
  """
  if not is_installed():
    raise UserError(f'{file} needs torch: {both_ways(file.parent)}')
  import torch

  try:
    tensors = _load(torch, str(file))
  except UserError:
    raise
  # Damaged files make torch raise many kinds of errors.
  except Exception as error:
    # One sentence of torch's advice names the refused object.
    lines = [line.strip() for line in str(error).splitlines()] or [repr(error)]
    reasons = [
      line.partition('. Please')[0]
      for line in lines[1:]
      if 'nsupported' in line
    ]
    raise UserError(
      f'{file} is damaged, or holds something other than tensors, which ptune'
      f' refuses: {(reasons or lines)[0]}'
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
      f'{file} has unsupported contents (expected tensors of'
      f' {", ".join(DTYPES)}):\n' + '\n'.join(unknown)
    )
  return {name: _leaf(torch, x) for name, x in tensors.items()}, {}


def both_ways(directory: epath.PathLike) -> str:
  """Says how to read such files, with or without torch here."""
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
  return torch.load(file, **how)  # Files of torch before 1.6 are not zip files.


def _dtype(tensor: Any) -> str:
  return str(tensor.dtype).removeprefix('torch.')


def _leaf(torch: Any, tensor: Any) -> Leaf:
  dtype = _dtype(tensor)

  def fetch(index: Index) -> np.ndarray:
    part = tensor.detach()[index].contiguous()
    if dtype == 'bfloat16':  # NumPy has no bfloat16.
      return part.view(torch.int16).numpy().view(jnp.bfloat16)
    return part.numpy()

  return Leaf(tuple(tensor.shape), jnp.dtype(dtype), fetch)
