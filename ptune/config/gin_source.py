"""Parses gin files and flags with gin's own parser, and imports nothing."""

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
  """A value that gin resolves later: '%MACRO' or '@configurable'."""

  name: str

  def __repr__(self) -> str:
    return self.name


@dataclasses.dataclass(frozen=True)
class Source:
  """The parsed contents of a gin file or a flag.

  Attributes:
    text: The source text.
    statements: The parser's statements; their values hold `Reference`s.
    reads: The macros that its values refer to.
  """

  text: str
  statements: Sequence[Any]
  reads: frozenset[str]

  @property
  def macros(self) -> dict[str, Any]:
    """The macros that it sets; a scope comes before the name."""
    return {
      f'{s.scope}/{s.selector}'.lstrip('/'): s.value
      for s in self.statements
      if isinstance(s, config_parser.BindingStatement) and not s.arg_name
    }

  @property
  def sets(self) -> dict[str, Any]:
    """All that it sets: macros, and parameters as `configurable.name`."""
    return {
      f'{s.scope}/{s.selector}.{s.arg_name}'.strip('/.'): s.value
      for s in self.statements
      if isinstance(s, config_parser.BindingStatement)
    }

  @property
  def includes(self) -> list[str]:
    """The gin files that it includes."""
    return [
      s.filename
      for s in self.statements
      if isinstance(s, config_parser.IncludeStatement)
    ]


def read_file(path: pathlib.Path) -> Source:
  """Reads and parses a gin file.

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
  """Parses the text after `--gin.`.

  Raises:
    UserError: If it cannot be parsed.
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
  """Makes a `Reference` where gin would look up a value."""

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
  """Parses a text; errors about it begin with `where`."""
  parser = _Parser()
  try:
    statements = list(config_parser.ConfigParser(text, parser))
  except (SyntaxError, tokenize.TokenError, ValueError) as error:
    line = ''
    if isinstance(error, SyntaxError) and error.lineno and '\n' in text:
      line = f'line {error.lineno}: {(error.text or "").strip()}: '
    raise UserError(
      f'{where}{line}this cannot be read ({_reason(error)}). Write values as in'
      ' Python: a string needs quotes, and on a command line a second pair of'
      f' quotes around them, as in {flag("MODEL_DIR")}'
    ) from error
  except RecursionError as error:
    raise UserError(f'{where}brackets are nested too deeply') from error
  return Source(text, statements, frozenset(parser.reads))


def _reason(error: Exception) -> str:
  """Returns the message of a syntax error of Python or gin, on one line."""
  reason = error.msg if isinstance(error, SyntaxError) else str(error.args[0])
  return reason.split('\n')[0].rstrip('.')


def _short(text: str) -> str:
  return text if len(text) <= 200 else f'{text[:200]}...'
