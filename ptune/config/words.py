"""Calls settings in messages as the user wrote them.

ptune's errors and its log call a setting by its macro. A user may have written
--steps=5 for TRAIN_STEPS, or steps=5 in Python.
"""

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping

from absl import logging

from ptune.config import flags, gin_files
from ptune.errors import UserError

# A macro, or its flag with an example: --gin.MODEL_DIR="'/runs/sst2'".
_MACRO = re.compile(
  r"""(?P<flag>--gin\.)?(?<![\w%@/'"])(?P<name>[A-Z][A-Z_]+)(?![\w/]|\.\w)"""
  r"""(?P<item>\['\w+'\])?"""
  r"""(?P<value>="'(?P<text>[^'"]*)'"|\ =\ (?=\S))?""",
  re.VERBOSE,
)


def of_flags(
  program: str, given: Collection[str], alone: bool
) -> dict[str, str]:
  """The flags of macros.

  Args:
    program: The program.
    given: The settings that are given as flags.
    alone: Whether the command line has no gin files and no --gin.NAME. If so,
      flags are suggested for the other settings too.

  Returns:
    {'TRAIN_STEPS': '--steps', ...}
  """
  found = {
    macro: f'--{flag}'
    for flag, macro in reversed(flags.names().items())
    if alone or flag in given
  }
  if program in flags.ASKING and 'split' in given:
    found[flags.ASKING[program]] = '--split'
  if 'base' in given:
    found['INITIAL_CHECKPOINT_PATH'] = found['CHECKPOINT_PATH'] = '--base'
  splits = [split for split in flags.SPLITS if split in given]
  if splits:
    found |= _of_files({split: f'--{split}' for split in splits})
  return found


def of_arguments() -> dict[str, str]:
  """The arguments of macros in Python: {'TRAIN_STEPS': 'steps', ...}."""
  found = {macro: name for name, macro in reversed(flags.names().items())}
  found['INITIAL_CHECKPOINT_PATH'] = found['CHECKPOINT_PATH'] = 'base'
  return found | _of_files({split: split for split in flags.SPLITS})


def _of_files(words: Mapping[str, str]) -> dict[str, str]:
  """The words for TASK_FILES as a whole, and for the files of each split."""
  each = {f"TASK_FILES['{split}']": word for split, word in words.items()}
  return {'TASK_FILES': ' or '.join(words.values()), **each}


def renamed(message: str, words: Mapping[str, str]) -> str:
  """Replaces the macros in a message by the words of the user.

    set SKIP_BAD_ROWS = True  ->  set --skip_bad_rows=True

  Args:
    message: The message.
    words: The words for some macros.
  """

  def replaced(match: re.Match[str]) -> str:
    name, item = match['name'], match['item'] or ''
    if name + item in words:
      name, item = name + item, ''
    if name not in words:
      return match[0]
    text = match['text']
    value = '=' if match['value'] else ''
    return words[name] + item + (value if text is None else f"='{text}'")

  return _MACRO.sub(replaced, message)


@contextlib.contextmanager
def in_log(rename: Callable[[str], str]) -> Iterator[None]:
  """Renames settings in what is logged inside."""

  def replace(record):
    said = record.getMessage()
    if (new := rename(said)) != said:
      record.msg, record.args = new, ()
    return True

  logger = logging.get_absl_logger()
  logger.addFilter(replace)
  try:
    yield
  finally:
    logger.removeFilter(replace)


@contextlib.contextmanager
def in_python() -> Iterator[None]:
  """Calls settings by the names of arguments, in errors and the log."""

  def rename(message: str) -> str:
    return renamed(message, of_arguments()).replace('--gin.', '')

  try:
    with in_log(rename):
      yield
  except (UserError, FileNotFoundError) as error:
    said = gin_files.message(error)
    if renamed(said, of_arguments()) == str(error):
      raise
    # Gin raises a subclass of its own, which cannot be made again.
    missing = isinstance(error, FileNotFoundError)
    kind = FileNotFoundError if missing else UserError
    raise kind(rename(said)) from None
