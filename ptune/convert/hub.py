"""Models by name: hf://google/flan-t5-base, or ptune://tiny of our own."""

import re
from typing import Any

from etils import epath

from ptune import paths, pretrained
from ptune.errors import UserError

# No weights but safetensors: the others are pickles, or of other frameworks.
FILES = ('*.json', '*.safetensors', '*.model')
SCHEME = 'hf://'


def locate(path: epath.PathLike) -> epath.Path:
  """Where a model lies: the path itself, or the directory of a name.

  Raises:
    ValueError: A name is unknown, or cannot be had.
  """
  if str(path).startswith(SCHEME):
    return download(str(path))
  if str(path).startswith(pretrained.SCHEME):
    return epath.Path(pretrained.directory(str(path)))
  return epath.Path(paths.local(path))


def download(name: str) -> epath.Path:
  """Brings a repository's files into the local cache of huggingface_hub.

  Args:
    name: hf://org/name, or hf://org/name@revision.

  Returns:
    The directory; without network, the one of an earlier call.

  Raises:
    ValueError: huggingface_hub is not installed, there is no such repository,
      or neither network nor an earlier copy.
  """
  match = re.fullmatch(r'hf://([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?', name)
  if not match:
    raise UserError(
      f'{name} is no name on the Hub; expected hf://org/name or '
      'hf://org/name@revision'
    )
  hub = library(name, 'Or download the directory, and give its path')
  try:
    return epath.Path(
      hub.snapshot_download(
        match[1], revision=match[2], allow_patterns=list(FILES)
      )
    )
  # Its errors come from HTTP, the file system and its own checks.
  except Exception as error:
    raise UserError(
      f'{name} cannot be downloaded, and is not in the local cache: '
      f'{type(error).__name__}: {error}\nWithout network, give the path of a '
      'directory that was downloaded elsewhere'
    ) from error


def library(what: str, otherwise: str = '') -> Any:
  """The package huggingface_hub, which comes with the extra `hub`.

  Args:
    what: What needs it.
    otherwise: What can be done without it.

  Raises:
    UserError: It is not installed.
  """
  try:
    import huggingface_hub
  except ImportError as error:
    raise UserError(
      f'{what} needs huggingface_hub: pip install "ptune[hub]". {otherwise}'
    ) from error
  return huggingface_hub
