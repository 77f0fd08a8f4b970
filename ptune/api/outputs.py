"""Writes trained parameters, for ptune and for other programs."""

import os
import pathlib
from typing import Any

from ptune.convert import export as export_lib
from ptune.convert import merged, output, prompts
from ptune.errors import UserError
from ptune.host import paths
from ptune.host.files import write_atomically

FORMATS = tuple(dict.fromkeys((*export_lib.FORMATS, *merged.MARKS)))


def save(source: Any, path: Any, base: str) -> None:
  """Writes a prompt or a method's parameters; see `Tuned.save`.

  Args:
    source: A run or a prompt file.
    path: The file to write.
    base: The base model.
  """
  path = _checked(path)
  layout = path.suffix.removeprefix('.') or 'npy'
  if layout not in ('npy', 'safetensors'):
    raise UserError(
      f'path is {str(path)!r}; expected a name that ends in .npy or'
      ' .safetensors. Other formats are written by export(path, format=...)'
    )
  if merged.is_trained(place := prompts.find(source)):
    _copy(place, path.with_suffix('.safetensors'))
    return
  export(source, path, base, layout, overwrite=True)


def export(
  source: Any, path: Any, base: str, layout: str, overwrite: bool
) -> None:
  """Writes a model for another program; see `Tuned.export`.

  Args:
    source: A run or a prompt file.
    path: The file or directory to write.
    base: The base model.
    layout: One of FORMATS.
    overwrite: Whether to replace an earlier output.
  """
  path = _checked(path)
  if not isinstance(overwrite, bool):
    raise UserError(f'overwrite is {overwrite!r:.80}; expected True or False')
  if not isinstance(layout, str) or layout not in FORMATS:
    raise UserError(
      f'format is {layout!r}; expected one of {", ".join(FORMATS)}'
    )
  if merged.is_trained(place := prompts.find(source)):
    merged.export_merged(place, layout, path, base=base, overwrite=overwrite)
    return
  prompt = prompts.read_prompt(source)
  export_lib.export(prompt, layout, path, base=base, overwrite=overwrite)


def _checked(path: Any) -> pathlib.Path:
  """The path of an output; raises UserError if it is none."""
  text = os.fspath(path) if isinstance(path, str | os.PathLike) else ''
  if paths.fault(text) or '://' in text:
    raise UserError(
      f'path is {path!r}; expected that of a local file or directory to write'
    )
  return pathlib.Path(text)


def _copy(trained: Any, to: pathlib.Path) -> None:
  """Copies the trained parameters of a method, and the facts beside them."""
  places = [output.check(to.with_suffix(x), True) for x in ('.json', to.suffix)]
  to.parent.mkdir(parents=True, exist_ok=True)
  for place in places:
    data = trained.with_suffix(place.suffix).read_bytes()
    write_atomically(place, data)
