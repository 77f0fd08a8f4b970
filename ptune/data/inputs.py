"""The inputs for a trained model: the rows of INFER_FILE."""

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import logging

from ptune.convert import storage
from ptune.data import seqio_task
from ptune.errors import UserError, counted
from ptune.tasks import rows as rows_lib
from ptune.tasks.metrics import UNLABELLED
from ptune.tasks.rows import BadRow, Row
from ptune.tasks.templates import Odd, columns_of, fill, listed, some_rows
from ptune.tasks.texts import TextTask

NAME = 'INFER_FILE'
STDIN = '-'


def read_inputs(
  file: str, task: seqio_task.Provider, score: bool
) -> list[tuple[str, dict[str, str], Row]]:
  """Reads inputs, and targets if there are any.

  In a text file, each line is an input; blank lines are skipped. If INPUTS has
  one column, a line is a text for this column, as in `Tuned.predict`; otherwise
  it is the text after preprocessing. A row of a .tsv, .csv or .jsonl file has
  the columns in the template INPUTS. If the row lacks them, or the task has no
  template, it has a column `inputs` with the text after preprocessing. The same
  holds for TARGETS and `targets`. Without `score`, only a column `targets` is
  read.

  Args:
    file: The file, or '-' for the lines of standard input.
    task: The task, whose templates are used if it has any.
    score: Whether every row needs targets.

  Returns:
    The location, the texts, and the columns of each row.

  Raises:
    FileNotFoundError: If the file does not exist.
    UserError: If there are bad rows; lists them.
  """
  suffix = rows_lib.suffix_of(file)
  table = suffix in rows_lib.SUFFIXES
  if score and not table:
    raise UserError(
      f'to score, {NAME} must be a .jsonl file, with {{"inputs": "...",'
      ' "targets": "..."} on each line, or a .tsv or .csv file with such'
      f' columns; got {file}'
    )
  local = storage.local(file)
  if file != STDIN and local is not None and not os.path.exists(local):
    raise FileNotFoundError(f'there is no {NAME} {file}')
  if table:
    rows = rows_lib.read_rows(file, NAME, may_be_empty=True)
  else:
    rows = _lines(file, _column(task))
  found, bad, odd = [], [], Odd('inputs', _template(task) or '{inputs}')
  for where, row in rows:
    try:
      if isinstance(row, BadRow):
        raise row
      texts = _texts(row, task, score)
      found.append((where, texts, row))
      odd.see(where, texts['inputs'])
    except BadRow as error:
      bad.append((where, str(error)))
  if bad:
    raise UserError(f'{counted(len(bad), "bad row")}:{listed(bad)}')
  odd.warn('stdin' if file == STDIN else file)
  return found


def _lines(file: str, column: str) -> Iterator[tuple[str, Row | BadRow]]:
  if file == STDIN:
    if jax.process_count() > 1:
      raise UserError(f'{NAME} is -, which several processes cannot share')
    name, lines = 'stdin', rows_lib.split_lines(sys.stdin.buffer.read())
  else:
    name, lines = file, rows_lib.read_lines(file, NAME)
  blank = []
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      blank.append(f'{name}:{number}')
    else:
      where = f'{name}:{number}'
      try:
        yield where, {column: rows_lib.decoded(line)}
      except BadRow as error:
        yield where, error
  if lines and not lines[-1]:
    del blank[-1]  # The end of the last line.
  if blank:
    skipped = f'{counted(len(blank), "blank line")} without an answer'
    logging.warning('%s: %s: %s', name, skipped, some_rows(blank))


def _column(task: seqio_task.Provider) -> str:
  """The column that a line of a text file fills."""
  columns = columns_of(_template(task) or '{inputs}', 'INPUTS')
  return columns[0] if len(columns) == 1 else 'inputs'


def _template(task: seqio_task.Provider) -> str | None:
  own = task.templates if isinstance(task, TextTask) else None
  return own and own.inputs


def _texts(row: Row, task: seqio_task.Provider, score: bool) -> dict[str, str]:
  templates = task.templates if isinstance(task, TextTask) else None
  if templates is None or not _has(row, templates.inputs):
    texts = _ready(row, 'inputs', templates and templates.inputs)
  else:
    texts = {'inputs': templates.of_inputs(row)}
  if 'targets' in row:
    return texts | _ready(row, 'targets')
  if not score:
    return texts
  if templates is None:
    raise BadRow('to score, each line must be {"inputs": ..., "targets": ...}')
  target = templates.of_targets(row)
  if templates.labels and target == UNLABELLED:
    raise BadRow('it has no label to score')
  return texts | {'targets': target}


def _has(row: Mapping[str, Any], template: str) -> bool:
  return all(column in row for column in columns_of(template, 'INPUTS'))


def _ready(row: Row, name: str, template: str | None = None) -> dict[str, str]:
  """The text in the column `name`."""
  if name not in row and template:
    fill(template, row)  # Raises an error that names the missing column.
  if not isinstance(row.get(name), str):
    raise BadRow(
      f'{name} must be a string, as in {{"{name}": "..."}}; got '
      f'{dict(row)!r:.80}'
    )
  return {name: fill(f'{{{name}}}', row)}
