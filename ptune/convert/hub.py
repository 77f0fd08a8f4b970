"""Models by name: hf://google/flan-t5-base, or ptune's own ptune://tiny."""

import re
from collections.abc import Iterator
from typing import Any

from absl import logging
from etils import epath

from ptune import pretrained
from ptune.convert import torch_files
from ptune.errors import UserError
from ptune.host import paths

# If there are safetensors, `_with_weights` downloads no other weights.
FILES = ('*.json', '*.safetensors', '*.model', 'merges.txt')
TORCH_FILES = ('pytorch_model*.bin',)
# This account's pull requests add safetensors that it makes from a repository's
# own weights; and the number of pull requests to try without network.
CONVERTER = 'SFconvertbot'
PULL_REQUESTS = 30
SCHEME = 'hf://'


def locate(path: epath.PathLike) -> epath.Path:
  """Returns the path itself, or the directory of a name.

  Raises:
    ValueError: A name is unknown, or its model is not available.
  """
  if str(path).startswith(SCHEME):
    return download(str(path))
  if str(path).startswith(pretrained.SCHEME):
    return epath.Path(pretrained.directory(str(path)))
  return epath.Path(paths.local(path))


def download(name: str) -> epath.Path:
  """Downloads a repository's files into huggingface_hub's local cache.

  Args:
    name: hf://org/name, or hf://org/name@revision.

  Returns:
    The directory; without network, the directory of an earlier call.

  Raises:
    ValueError: huggingface_hub is not installed, there is no such repository,
      or there is neither a network nor an earlier copy.
  """
  match = re.fullmatch(r'hf://([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?', name)
  if not match:
    raise UserError(
      f'{name} is not a name on the Hub; expected hf://org/name or '
      'hf://org/name@revision'
    )
  hub = library(name, 'Or download the directory, and give its path')
  repository, revision = match[1], match[2]
  try:
    found = epath.Path(
      hub.snapshot_download(
        repository, revision=revision, allow_patterns=list(FILES)
      )
    )
    if revision is None and _lacks_weights(found):
      return _with_weights(hub, repository, found)
    return found
  # Errors come from HTTP, the file system and huggingface_hub's own checks.
  except Exception as error:
    raise UserError(
      f'{name} cannot be downloaded, and is not in the local cache: '
      f'{type(error).__name__}: {error}\nWithout a network, give the path of a '
      'directory that you downloaded elsewhere'
    ) from error


def _lacks_weights(directory: epath.Path) -> bool:
  """Returns whether a directory has a model without its weights."""
  names = {child.name for child in directory.iterdir()}
  return (
    'config.json' in names
    and 'adapter_config.json' not in names
    and not any(name.endswith('.safetensors') for name in names)
  )


def _with_weights(hub: Any, repository: str, main: epath.Path) -> epath.Path:
  """Returns a directory of a model without safetensors on its main branch.

  Many older models (T5 1.1, mT5) have safetensors only in a pull request by the
  Hub's own converter. Without one, we read torch's files if torch is installed.
  """
  for revision, how in _conversions(hub, repository):
    try:
      found = epath.Path(
        hub.snapshot_download(
          repository, revision=revision, allow_patterns=list(FILES), **how
        )
      )
    except Exception:  # There is no network, and it is not in the cache.
      continue
    if not _lacks_weights(found):
      logging.info(
        '%s has no safetensors; reading those of its pull request %s, made by'
        ' %s',
        repository,
        revision,
        CONVERTER,
      )
      return found
  if torch_files.is_installed():
    logging.info('%s has no safetensors; torch reads its files', repository)
    patterns = [*FILES, *TORCH_FILES]
    return epath.Path(
      hub.snapshot_download(repository, revision=None, allow_patterns=patterns)
    )
  return main


def _conversions(
  hub: Any, repository: str
) -> Iterator[tuple[str, dict[str, bool]]]:
  """Returns revisions that may have safetensors, and how to download them."""
  try:
    requests = hub.HfApi().get_repo_discussions(
      repository, author=CONVERTER, discussion_type='pull_request'
    )
    numbers = [request.num for request in requests]
  except Exception:  # Without network, use earlier downloads.
    for number in range(1, PULL_REQUESTS + 1):
      yield f'refs/pr/{number}', {'local_files_only': True}
    return
  for number in numbers:
    yield f'refs/pr/{number}', {}


def library(what: str, otherwise: str = '') -> Any:
  """Imports huggingface_hub, which the extra `hub` installs.

  Args:
    what: The feature that needs it.
    otherwise: What the user can do without it.

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
