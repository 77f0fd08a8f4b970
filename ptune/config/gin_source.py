"""What gin files and flags say, by gin's own parser; nothing is imported."""

import dataclasses
import pathlib
import re
import tokenize
from collections.abc import Sequence
from typing import Any, NamedTuple

from gin import config_parser
from ptune.config.macros import MACROS, flag
from ptune.errors import UserError


class Reference(NamedTuple):
  """What stands for a value: '%MACRO', or '@configurable'."""

  name: str


@dataclasses.dataclass(frozen=True)
class Source:
  """What a gin file or a flag says. Nothing is imported to know it.

  Attributes:
    text: As it is written.
    statements: As gin's parser gives them, with `Reference`s in their values.
    reads: The macros in its values.
  """

  text: str
  statements: Sequence[Any]
  reads: frozenset[str]

  @property
  def macros(self) -> dict[str, Any]:
    """The macros that it sets; those of a scope have that before them."""
    return {
      f'{s.scope}/{s.selector}'.lstrip('/'): s.value
      for s in self.statements
      if isinstance(s, config_parser.BindingStatement) and not s.arg_name
    }

  @property
  def sets(self) -> list[str]:
    """What it sets: macros, and parameters as `configurable.name`."""
    return [
      f'{s.scope}/{s.selector}.{s.arg_name}'.strip('/.')
      for s in self.statements
      if isinstance(s, config_parser.BindingStatement)
    ]

  @property
  def includes(self) -> list[str]:
    """The gin files that it includes."""
    return [
      s.filename
      for s in self.statements
      if isinstance(s, config_parser.IncludeStatement)
    ]


def read_file(path: pathlib.Path) -> Source:
  """The source of a gin file.

  Raises:
    UserError: If it cannot be read.
  """
  try:
    text = path.read_text('utf-8-sig')
  except UnicodeDecodeError as error:
    raise UserError(
      f'{path} is not UTF-8: byte {error.object[error.start]:#04x} at'
      f' {error.start}; save it as UTF-8'
    ) from error
  return parse(text + '\n', f'{path}, ')


def read_flag(binding: str) -> Source:
  """The source of what stands behind `--gin.`.

  Raises:
    UserError: If it cannot be read.
  """
  text = binding.strip()
  name = re.split(r'[=:\s]', text, maxsplit=1)[0]
  if not re.match(r'[\w./]+\s*=|.*[\n:]', text):
    raise UserError(
      f'--gin.{text} has no value; expected --gin.NAME=VALUE,'
      f' such as {flag(name if name in MACROS else "TRAIN_STEPS")}'
    )
  return parse(binding, f'--gin.{_short(text)}: ')


class _Parser(config_parser.ParserDelegate):
  """Makes `Reference`s of what gin would look up."""

  def __init__(self):
    self.reads: set[str] = set()

  def configurable_reference(self, scoped_configurable_name, evaluate):
    """See gin."""
    return Reference(f'@{scoped_configurable_name}' + '()' * evaluate)

  def macro(self, macro_name):
    """See gin."""
    self.reads.add(macro_name)
    return Reference(f'%{macro_name}')


def parse(text: str, where: str = '') -> Source:
  """The source of a text; `where` begins what is said of its mistakes."""
  parser = _Parser()
  try:
    statements = list(config_parser.ConfigParser(text, parser))
  except (SyntaxError, tokenize.TokenError, ValueError) as error:
    line = ''
    if isinstance(error, SyntaxError) and error.lineno and '\n' in text:
      line = f'line {error.lineno}: {(error.text or "").strip()}: '
    raise UserError(
      f'{where}{line}this cannot be read ({_reason(error)}). Values are'
      ' written as in Python: strings have quotes, which on a command line need'
      f' others around them, as in {flag("MODEL_DIR")}'
    ) from error
  except RecursionError as error:
    raise UserError(f'{where}brackets are nested too deeply') from error
  return Source(text, statements, frozenset(parser.reads))


def _reason(error: Exception) -> str:
  """What Python or gin say of a syntax error, on one line."""
  reason = error.msg if isinstance(error, SyntaxError) else str(error.args[0])
  return reason.split('\n')[0].rstrip('.')


def _short(text: str) -> str:
  return text if len(text) <= 200 else f'{text[:200]}...'
