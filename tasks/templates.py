"""Rows to texts: templates with columns in braces, and the rule for labels."""

import math
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from ptune.errors import UserError
from ptune.tasks.metrics import UNLABELLED
from ptune.tasks.rows import BadRow, Row
from ptune.tasks.rows import listed as listed_columns

SHOWN = 20  # Bad rows that a message lists; it counts all.

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
    seen = next((x for x in ',;' if len(there) == 1 and x in there[0]), None)
    hint = f'. They seem to be separated by {seen!r}, as in a .csv file'
    raise BadRow(
      f'no column {column!r}, it has: {listed_columns(there)}'
      f'{hint if seen else ""}'
    )
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
    return str(value)
  raise BadRow(f'column {column!r} is {kind}, expected a text or number')


def _plain(value: Any) -> Any:
  """Converts a NumPy value, as in a DataFrame, to a Python value."""
  return value.item() if getattr(value, 'ndim', None) == 0 else value


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
  spellings = [value] if as_number is None else [value, str(as_number)]
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
  try:
    number = float(text)
  except ValueError:
    return None
  return int(number) if number.is_integer() and '_' not in text else None


def _in_range(row: Row, labels: Labels, number: int | None) -> int:
  if number is not None and 0 <= number < len(labels.names):
    return number
  numbers = f'a number from 0 to {len(labels.names) - 1}, '
  value = row[labels.column]
  raise BadRow(
    f'unknown label {str(value)!r} in column {labels.column!r}, expected '
    f'{"" if labels.exact else numbers}one of {labels.names}, or -1 for none'
  )


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
  bad = []
  for where, row in rows:
    try:
      if isinstance(row, BadRow):
        raise row
      text, target = templates.of_inputs(row), templates.of_targets(row)
    except BadRow as error:
      bad.append(f'{where}: {error}')
      continue
    texts['inputs'].append(text)
    texts['targets'].append(target)
  if bad and not skip_bad_rows:
    raise UserError(
      f'{len(bad)} bad rows; fix them, or set SKIP_BAD_ROWS = True to leave '
      f'them out:{listed(bad)}'
    )
  if bad:
    logging.warning('%d bad rows are left out:%s', len(bad), listed(bad))
  if not texts['inputs']:
    without = f', and {len(bad)} bad ones' if bad else ''
    raise UserError(f'{split} has no good rows{without}; expected at least one')
  return texts


def listed(bad: Sequence[str]) -> str:
  """Returns the first bad rows, one a line, and the number of further ones."""
  more = [f'and {len(bad) - SHOWN} more'] if len(bad) > SHOWN else []
  return ''.join(f'\n  {line}' for line in [*bad[:SHOWN], *more])
