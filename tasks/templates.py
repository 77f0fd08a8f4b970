"""Rows to texts: templates with columns in braces, and the rule for labels."""

import math
import re
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from ptune.errors import UserError, counted, nearest, some
from ptune.tasks.metrics import UNLABELLED
from ptune.tasks.rows import BadRow, Row, nul
from ptune.tasks.rows import listed as listed_columns

SHOWN = 20  # Errors of bad rows that a message lists; it counts all.
SHOWN_PLACES = 8  # The rows that it names for one error.

LabelNames = Sequence[str] | Mapping[str, str]


def columns_of(template: str, macro: str) -> list[str]:
  """Returns the columns in a template.

  Args:
    template: Such as 'sentence: {sentence}'.
    macro: The macro that sets it, for messages.

  Raises:
    UserError: It is not a template.
  """
  if not isinstance(template, str):
    raise UserError(
      f'{macro} is {template!r}, expected a text with columns in braces, such '
      "as 'sentence: {sentence}'"
    )
  try:
    parts = list(string.Formatter().parse(template))
  except ValueError as error:
    raise UserError(f'{macro} is {template!r}: {error}') from error
  found = [name for _, name, _, _ in parts if name is not None]
  if not all(found):
    raise UserError(
      f'{macro} is {template!r}, expected a column in every pair of braces; '
      'write {{ and }} for braces in the text'
    )
  if not found:
    raise UserError(
      f'{macro} is {template!r}, which is the same for all rows; expected at '
      "least one column in braces, such as 'sentence: {sentence}'"
    )
  formats = [
    f'{{{name}{f"!{how}" if how else ""}{f":{spec}" if spec else ""}}}'
    for _, name, spec, how in parts
    if name is not None and (spec or how)
  ]
  if formats:
    raise UserError(
      f'{macro} is {template!r}; columns are taken as they are, so write '
      f'{{column}} without a format instead of {", ".join(formats)}'
    )
  return found


def fill(template: str, row: Row) -> str:
  """Fills a template with the columns of a row.

  Raises:
    BadRow: A column is missing, or is not text.
  """
  text = []
  for literal, column, _, _ in string.Formatter().parse(template):
    text.append(literal)
    if column is not None:
      text.append(_value(row, column))
  return ''.join(text)


def _value(row: Row, column: str) -> str:
  if column not in row:
    there = list(map(str, row))
    hint = nearest(column, there[:1000], most=0)
    for mark in ',;|' if len(there) == 1 else '':
      if mark in there[0]:
        hint = f'. They seem to be separated by {mark!r}'
        hint += ', as in a .csv file' if mark in ',;' else ', not by tabs or ,'
    raise BadRow(f'no column {column!r}, it has: {listed_columns(there)}{hint}')
  value = _plain(row[column])
  kind = 'null' if value is None else f'a {type(value).__name__}'
  if isinstance(value, float) and not math.isfinite(value):
    raise BadRow(f'column {column!r} is {value}, expected a text or number')
  if isinstance(value, bool):
    return str(int(value))
  if isinstance(value, str | int | float):
    try:
      str(value).encode()
    except UnicodeEncodeError as error:
      raise BadRow(f'column {column!r} is not Unicode: {error}') from None
    except ValueError as error:  # An integer of thousands of digits.
      raise BadRow(f'column {column!r}: {error}') from None
    if '\0' in str(value):
      raise BadRow(f'column {column!r}: {nul(str(value))}')
    return str(value)
  raise BadRow(f'column {column!r} is {kind}, expected a text or number')


def _plain(value: Any) -> Any:
  """Converts a NumPy value, as in a DataFrame, to a Python value."""
  return value.item() if getattr(value, 'ndim', None) == 0 else value


class Odd:
  """Counts texts that are allowed and seldom meant, and warns of them.

  These are texts without anything in the columns of their template, and texts
  with control characters or the mark of characters that were lost.
  """

  def __init__(self, what: str, template: str):
    """Starts with no texts.

    Args:
      what: 'inputs' or 'targets'.
      template: The template that made the texts.
    """
    blank = dict.fromkeys(columns_of(template, what.upper()), '')
    words = map(re.escape, fill(template, blank).split())
    self._blank = re.compile(r'\s*'.join(['', *words, '']))
    self._what, self._seen = what, 0
    self._found: dict[str, list[str]] = {}

  def see(self, where: str, text: str) -> None:
    """Looks at a text; `where` is its row."""
    self._seen += 1
    if self._blank.fullmatch(text):
      kind = f'{self._what} without any text'
      self._found.setdefault(kind, []).append(where)
    if found := _ODD.search(text):
      kind = f'characters in the {self._what} that are no text'
      self._found.setdefault(kind, []).append(f'{where}, {found[0]!a}')

  def warn(self, name: str) -> None:
    """Warns of what was found in the rows that are called `name`."""
    for kind, places in self._found.items():
      of = f'{len(places)} of {counted(self._seen, "row")}'
      have = 'has' if len(places) == 1 else 'have'
      logging.warning(
        '%s: %s %s %s: %s', name, of, have, kind, some_rows(places)
      )


# Control characters except blanks and line ends, and the mark of lost ones.
_ODD = re.compile(r'[\x01-\x08\x0e-\x1f\x7f\ufffd]')


# ---------------------------------------------------------------------- labels


class Labels(NamedTuple):
  """A classification's labels.

  Attributes:
    column: The column that has them.
    names: Their names; if LABEL_NAMES is a dict, the values of the column.
    texts: The targets, in the same order.
    exact: Whether the column has these names and no numbers.
  """

  column: str
  names: list[str]
  texts: list[str]
  exact: bool


def labels_of(targets: str, names: LabelNames) -> Labels:
  """Returns the labels that LABEL_NAMES and the template TARGETS describe.

  Raises:
    UserError: They do not fit together.
  """
  columns = columns_of(targets, 'TARGETS')
  if len(columns) != 1:
    raise UserError(
      f'TARGETS is {targets!r}, expected one column, the label, because there '
      'are LABEL_NAMES'
    )
  exact = isinstance(names, Mapping)
  good = isinstance(names, Mapping | Sequence) and not isinstance(names, str)
  words = list(names.values() if isinstance(names, Mapping) else names)
  given = list(names)
  if not good or not all(isinstance(x, str) for x in (*words, *given)):
    raise UserError(
      f'LABEL_NAMES is {names!r}, expected a list of texts, such as '
      "['negative', 'positive']"
    )
  texts = [fill(targets, {columns[0]: word}) for word in words]
  if len(set(texts)) != len(texts) or len(texts) < 2:
    raise UserError(
      f'LABEL_NAMES is {names!r}, expected at least two different names'
    )
  if UNLABELLED in texts:
    raise UserError(
      f'LABEL_NAMES is {names!r}; {UNLABELLED!r} means that there is no label'
    )
  return Labels(columns[0], given, texts, exact)


_BOOLEANS = {'true': 1, 'false': 0}


def _label(row: Row, labels: Labels) -> str:
  """Returns the target of a row, by the rules in the docstring of `files`."""
  column, names, texts, exact = labels
  value = _plain(row[column]) if column in row else _value(row, column)
  if isinstance(value, float) and math.isnan(value):
    raise BadRow(
      f'column {column!r} is nan, expected a label; a row without one has -1 or'
      ' null'
    )
  if value is not None:
    value = str(value) if isinstance(value, bool) else _value(row, column)
  if value is None or (value == '' and '' not in names):
    return UNLABELLED
  as_number = _number(value)
  spellings = [value]
  if as_number is not None:
    spellings += [name for name in names if _number(name) == as_number]
  if value.lower() in _BOOLEANS:
    as_number = _BOOLEANS[value.lower()]
    spellings += [value.lower(), value.capitalize(), value.upper()]
    named = [names.index(x) for x in spellings if x in names]
    return texts[named[0] if named else _in_range(row, labels, as_number)]
  named = [names.index(x) for x in spellings if x in names]
  if exact:
    as_number = None if as_number != -1 or named else -1
  if named and as_number is not None and -1 <= as_number < len(names):
    meant = 'no label' if as_number == -1 else repr(texts[as_number])
    if as_number != named[0]:
      raise BadRow(
        f'label {value!r} in column {column!r} is the name of a label and the '
        f"number of {meant}. Make LABEL_NAMES a dict, from the column's value "
        f"to the label's name: {dict(zip(names, names, strict=True))}"
      )
  if named:
    return texts[named[0]]
  if as_number == -1:
    return UNLABELLED
  return texts[_in_range(row, labels, as_number)]


def _number(text: str) -> int | None:
  """Parses '1' and '1.0' as 1; returns None for other texts."""
  whole = re.fullmatch(r'([+-]?\d{1,99})(\.0*)?', text, re.ASCII)
  return int(whole[1]) if whole else None


def _in_range(row: Row, labels: Labels, number: int | None) -> int:
  value, names = str(row[labels.column]), labels.names
  if number is not None and 0 <= number < len(names):
    if _number(names[number]) is None:
      return number
    raise BadRow(
      f'label {value!r} in column {labels.column!r} is no name of a label, and'
      f' it is the number of {names[number]!r}, which is another number. Make'
      " LABEL_NAMES a dict, from the column's value to the label's name"
    )
  numbers = f'a number from 0 to {len(names) - 1}, '
  alike = [name for name in names if _folded(name) == _folded(value)]
  raise BadRow(
    f'unknown label {value!r} in column {labels.column!r}, expected '
    f'{"" if labels.exact else numbers}one of {names}, or -1 for none'
    + (f'; {value!a} and {alike[0]!a} look alike' if alike else '')
  )


def _folded(text: str) -> str:
  """Returns a text without case, outer blanks and invisible characters."""
  text = unicodedata.normalize('NFKC', text).casefold()
  return ''.join(x for x in text if unicodedata.category(x) != 'Cf').strip()


# ----------------------------------------------------------------------- texts


class Templates(NamedTuple):
  """Makes texts of rows.

  Attributes:
    inputs: The template of the inputs.
    targets: The template of the targets.
    labels: The labels of a classification.
  """

  inputs: str
  targets: str
  labels: Labels | None

  def of_inputs(self, row: Row) -> str:
    """Returns the inputs of a row; raises BadRow."""
    return fill(self.inputs, row)

  def of_targets(self, row: Row) -> str:
    """Returns the targets of a row; raises BadRow."""
    return _label(row, self.labels) if self.labels else fill(self.targets, row)

  def read(self, row: Row) -> dict[str, Any]:
    """Returns what the templates read of a row, as JSON can hold it.

    Raises:
      BadRow: If a column is missing, or has no text, number or label.
    """
    self.of_inputs(row), self.of_targets(row)
    columns = columns_of(self.inputs, 'INPUTS')
    columns += columns_of(self.targets, 'TARGETS')
    return {column: _plain(row[column]) for column in columns}


def templates_of(
  inputs: str, targets: str, label_names: LabelNames | None
) -> Templates:
  """Checks INPUTS, TARGETS and LABEL_NAMES, and returns them as `Templates`.

  Raises:
    UserError: They are not templates, or do not fit together.
  """
  columns_of(inputs, 'INPUTS'), columns_of(targets, 'TARGETS')
  labels = labels_of(targets, label_names) if label_names else None
  return Templates(inputs, targets, labels)


def to_texts(
  split: str,
  rows: Iterable[tuple[str, Row | BadRow]],
  inputs: str,
  targets: str,
  label_names: LabelNames | None,
  skip_bad_rows: bool,
) -> dict[str, list[str]]:
  """Fills the templates with rows.

  Args:
    split: Its name, for messages.
    rows: Each row's location, and the row or its error.
    inputs: The template of the inputs.
    targets: The template of the targets.
    label_names: See `files.from_files`.
    skip_bad_rows: Whether to leave out bad rows, which are logged.

  Returns:
    'inputs' and 'targets': lists of the same length.

  Raises:
    UserError: There are bad rows, which it lists, or no good rows.
  """
  templates = templates_of(inputs, targets, label_names)
  texts: dict[str, list[str]] = {'inputs': [], 'targets': []}
  # Large files have few labels, so we read each value once.
  known: dict[Any, str] = {}
  column = templates.labels.column if templates.labels else None
  odd = [Odd('inputs', inputs)]
  if not label_names:
    odd.append(Odd('targets', targets))
  bad = []
  for where, row in rows:
    try:
      if isinstance(row, BadRow):
        raise row
      text, value = templates.of_inputs(row), row.get(column)
      if not isinstance(value, str) or column is None:
        target = templates.of_targets(row)
      elif (target := known.get(value)) is None:
        target = known[value] = templates.of_targets(row)
    except BadRow as error:
      bad.append((where, str(error)))
      continue
    texts['inputs'].append(text)
    texts['targets'].append(target)
    for one, written in zip(odd, (text, target), strict=False):
      one.see(where, written)
  if bad and not skip_bad_rows:
    fix = '; set SKIP_BAD_ROWS = True to leave out bad rows'
    if not texts['inputs']:  # Then nothing would be left.
      fix = f', and {split} has no good one'
      if any(why.startswith('no column') for _, why in bad):
        fix += "; name its columns in INPUTS and TARGETS, as '{column}'"
    raise UserError(f'{counted(len(bad), "bad row")}{fix}:{listed(bad)}')
  if bad:
    logging.warning('left out %s:%s', counted(len(bad), 'bad row'), listed(bad))
  if not texts['inputs']:
    without = f', and {counted(len(bad), "bad one")}' if bad else ''
    raise UserError(f'{split} has no good rows{without}; expected at least one')
  for one in odd:
    one.warn(split)
  return texts


def some_rows(places: Sequence[str]) -> str:
  """Returns the first places of rows, and how many others there are."""
  return some(places, SHOWN_PLACES, 'other row')


def listed(bad: Sequence[tuple[str, str]]) -> str:
  """Returns the errors of bad rows, each once, on a line of its own.

  Args:
    bad: The location of each bad row, and its error.
  """
  places: dict[str, list[str]] = {}
  for where, error in bad:
    places.setdefault(error, []).append(where)
  lines = []
  for error, found in places.items():
    lines.append(f'{some_rows(found)}: {error}')
  if len(lines) > SHOWN:
    lines[SHOWN:] = [f'and {counted(len(lines) - SHOWN, "other error")}']
  return ''.join(f'\n  {line}' for line in lines)
