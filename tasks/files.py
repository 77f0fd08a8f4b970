"""A user's own rows as a task, without Python: TSV, CSV, JSON lines.

    ptune train --gin_file=tasks/from_files.gin \\
      --gin.TASK_FILES="{'train': 'train.tsv', 'validation': 'dev.tsv'}" \\
      --gin.INPUTS="'sentence: {sentence}'" --gin.TARGETS="'{label}'" \\
      --gin.LABEL_NAMES="['negative', 'positive']" ...

The first line of a TSV or CSV file names the columns; a template has them in
braces. TSV knows no quotes: a tab ends a field, a line end a row. CSV fields
may stand in double quotes, with commas and line ends in them. A line of JSON is
an object whose values are texts, numbers or booleans. Files are UTF-8, local or
on gs://, and kept in memory.

With LABEL_NAMES the task is a classification: the column in TARGETS has a
label's number or its name, -1 where it is unknown. Whatever is wrong with a
row stops the run and names file and line, unless SKIP_BAD_ROWS is set.
"""

import csv
import difflib
import functools
import json
import os
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf
from absl import logging

from ptune.errors import UserError
from ptune.tasks import metrics as metrics_lib
from ptune.tasks import postprocessors, registry
from ptune.tasks.preprocessors import UNLABELLED

SUFFIXES = ('.tsv', '.csv', '.jsonl')
SHOWN = 20  # bad rows that a message lists; it counts all

Row = Mapping[str, Any]


class BadRow(UserError):
  """What is wrong with one row; whoever reads it knows where it is."""


# --------------------------------------------------------------------- reading


def read_rows(file: str) -> Iterator[tuple[str, Row | BadRow]]:
  """Yields where each row of a file stands, 'dev.tsv:7', and the row.

  Blank lines are left out. A row that cannot be read is yielded as the error.

  Raises:
    ValueError: The file does not exist, has no rows or an unknown suffix.
  """
  suffix = os.path.splitext(file)[1]
  if suffix not in SUFFIXES:
    raise UserError(
      f'TASK_FILES has {file!r}, expected a name that ends in one of '
      f'{", ".join(SUFFIXES)}'
    )
  try:
    with tf.io.gfile.GFile(file, 'rb') as f:
      data = f.read()
  except (tf.errors.NotFoundError, tf.errors.FailedPreconditionError) as error:
    raise UserError(
      f'TASK_FILES has {file!r}, which cannot be read: {error}. A relative '
      f'path starts at {os.getcwd()}'
    ) from error
  lines = data.removeprefix(b'\xef\xbb\xbf').split(b'\n')
  lines = [line.removesuffix(b'\r') for line in lines]
  if not any(line.strip() for line in lines):
    raise UserError(f'TASK_FILES has {file!r}, which is empty')
  read = {'.tsv': _read_tsv, '.csv': _read_csv, '.jsonl': _read_jsonl}[suffix]
  for number, row in read(file, lines):
    yield f'{file}:{number}', row


def _decoded(line: bytes) -> str:
  try:
    return line.decode('utf-8')
  except UnicodeDecodeError as error:
    raise BadRow(
      f'byte {error.object[error.start]:#04x}, the {error.start + 1}. of the '
      'line, is not UTF-8'
    ) from None


def _checked(read: Callable[..., Row], *args: Any) -> Row | BadRow:
  try:
    return read(*args)
  except BadRow as error:
    return error


def _columns(file: str, fields: Sequence[str]) -> Sequence[str]:
  twice = sorted({f for f in fields if fields.count(f) > 1})
  if twice:
    raise UserError(f'{file}:1 names the columns {twice} more than once')
  return fields


def _with_columns(columns: Sequence[str], fields: Sequence[str]) -> Row:
  if len(fields) != len(columns):
    raise BadRow(
      f'{len(fields)} fields, expected {len(columns)}: {", ".join(columns)}'
    )
  return dict(zip(columns, fields, strict=True))


def _read_tsv(file, lines):
  columns = None
  for number, line in enumerate(lines, start=1):
    if not line.strip(b' '):
      continue
    if columns is None:
      columns = _columns(file, _header(file, line).split('\t'))
      continue
    yield (
      number,
      _checked(
        lambda line: _with_columns(columns, _decoded(line).split('\t')),  # noqa: B023
        line,
      ),
    )


def _header(file: str, line: bytes) -> str:
  try:
    return _decoded(line)
  except BadRow as error:
    raise UserError(f'{file}:1, which names the columns: {error}') from None


def _read_csv(file, lines):
  # Bytes that are no UTF-8 become characters of their own, told by them.
  texts = [line.decode('utf-8', errors='surrogateescape') for line in lines]
  reader = csv.reader([text + '\n' for text in texts], strict=True)
  columns = None
  while True:
    first = reader.line_num + 1
    try:
      fields = next(reader)
    except StopIteration:
      return
    except csv.Error as error:
      yield first, BadRow(f'is not CSV: {error}')
      continue
    if not fields:
      continue
    if columns is None:
      header = ','.join(fields).encode('utf-8', errors='surrogateescape')
      _header(file, header)
      columns = _columns(file, fields)
      continue

    def row(columns=columns, fields=fields):
      for field in fields:
        _decoded(field.encode('utf-8', errors='surrogateescape'))
      return _with_columns(columns, fields)

    yield first, _checked(row)


def _read_jsonl(file, lines):
  del file

  def row(line):
    try:
      record = json.loads(_decoded(line))
    except json.JSONDecodeError as error:
      raise BadRow(f'is not JSON: {error}') from None
    if not isinstance(record, dict):
      raise BadRow('is not a JSON object, expected {"column": value, ...}')
    return record

  for number, line in enumerate(lines, start=1):
    if line.strip():
      yield number, _checked(row, line)


# ------------------------------------------------------------------- templates


def _fields(template: str, macro: str) -> list[str]:
  """The columns that a template names."""
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
  return found


def _fill(template: str, row: Row) -> str:
  text = []
  for literal, column, _, _ in string.Formatter().parse(template):
    text.append(literal)
    if column is not None:
      text.append(_value(row, column))
  return ''.join(text)


def _value(row: Row, column: str) -> str:
  if row.get(column) is None:
    raise BadRow(f'no column {column!r}, it has: {", ".join(map(str, row))}')
  value = row[column]
  if isinstance(value, bool):
    return str(int(value))
  if isinstance(value, str | int | float):
    try:
      str(value).encode()
    except UnicodeEncodeError as error:
      raise BadRow(f'column {column!r} is no Unicode text: {error}') from None
    return str(value)
  raise BadRow(
    f'column {column!r} is a {type(value).__name__}, expected a text or number'
  )


def _labels(targets: str, names: Sequence[str]) -> tuple[str, list[str]]:
  """The column of a classification's labels, and their texts as targets."""
  columns = _fields(targets, 'TARGETS')
  if len(columns) != 1:
    raise UserError(
      f'TARGETS is {targets!r}, expected one column, the label, because there '
      'are LABEL_NAMES'
    )
  texts = [_fill(targets, {columns[0]: name}) for name in names]
  if len(set(texts)) != len(texts) or len(texts) < 2:
    raise UserError(
      f'LABEL_NAMES is {list(names)}, expected at least two different names'
    )
  return columns[0], texts


def label_texts(targets: str, names: Sequence[str]) -> list[str]:
  """The targets of a classification, in the order of its labels."""
  return _labels(targets, names)[1]


def _label_text(row: Row, column: str, names: Sequence[str], texts) -> str:
  given, value = row.get(column), _value(row, column)
  if isinstance(given, float) and given.is_integer():
    given = int(given)  # As pandas writes labels among which one is missing.
  if isinstance(given, int):  # Not a name, which may be a number as well.
    number = int(given)
  elif value in names:
    number = list(names).index(value)
  else:
    try:
      number = int(value)
    except ValueError:
      number = len(names)
  if number == -1:
    return UNLABELLED
  if not 0 <= number < len(names):
    raise BadRow(
      f'unknown label {value!r} in column {column!r}, expected a number from 0 '
      f'to {len(names) - 1}, one of {list(names)}, or -1 for none'
    )
  return texts[number]


def to_texts(
  rows: Iterable[tuple[str, Row | BadRow]],
  inputs: str,
  targets: str,
  label_names: Sequence[str] | None,
  skip_bad_rows: bool,
) -> dict[str, list[str]]:
  """Fills the templates with rows.

  Args:
    rows: Where each row stands, and the row or what is wrong with it.
    inputs: The template of the inputs.
    targets: That of the targets.
    label_names: See `from_files`.
    skip_bad_rows: Whether to leave out bad rows, which are logged.

  Returns:
    'inputs' and 'targets': lists of the same length.

  Raises:
    ValueError: There are bad rows, which are listed, or no good ones.
  """
  label = label_names and _labels(targets, label_names)
  texts: dict[str, list[str]] = {'inputs': [], 'targets': []}
  bad = []
  for where, row in rows:
    try:
      if isinstance(row, BadRow):
        raise row
      text = _fill(inputs, row)
      if label:
        target = _label_text(row, label[0], label_names or (), label[1])
      else:
        target = _fill(targets, row)
    except BadRow as error:
      bad.append(f'{where}: {error}')
      continue
    texts['inputs'].append(text)
    texts['targets'].append(target)
  if bad:
    some = '\n  '.join(bad[:SHOWN])
    more = f'\n  and {len(bad) - SHOWN} more' if len(bad) > SHOWN else ''
    if not skip_bad_rows:
      raise UserError(
        f'{len(bad)} bad rows; mend them, or set SKIP_BAD_ROWS = True to leave '
        f'them out:\n  {some}{more}'
      )
    logging.warning('%d bad rows are left out:\n  %s%s', len(bad), some, more)
  if not texts['inputs']:
    raise UserError(f'There are no good rows, and {len(bad)} bad ones')
  return texts


# ------------------------------------------------------------------------ task


def _scoring(
  metrics: Sequence[str] | None, labels: Sequence[str] | None
) -> tuple[Callable[..., Any] | None, list[metrics_lib.Metric]]:
  """The postprocessor and the functions of METRICS."""
  if metrics is None:
    metrics = ['accuracy' if labels else 'exact_match']
  kinds = {
    name: kind for kind, some in metrics_lib.BY_NAME.items() for name in some
  }
  kinds['macro_f1'] = 'label'
  unknown = [name for name in metrics if name not in kinds]
  if unknown:
    near = difflib.get_close_matches(unknown[0], kinds, n=3)
    raise UserError(
      f'METRICS has {unknown}, expected some of {sorted(kinds)}'
      + (f'; did you mean {near}?' if near else '')
    )
  compared = {kinds[name] for name in metrics}
  if len(compared) > 1:
    raise UserError(
      f'METRICS is {list(metrics)}, expected what compares the same; these '
      f'compare {", ".join(f"{name}: {kinds[name]}" for name in metrics)}'
    )
  kind = compared.pop() if compared else 'text'
  if (kind == 'label') != (labels is not None and bool(metrics)):
    raise UserError(
      f'METRICS is {list(metrics)} and LABEL_NAMES {labels}: metrics of labels '
      'and LABEL_NAMES need each other'
    )
  functions = [
    metrics_lib.macro_f1(len(labels or ()))
    if name == 'macro_f1'
    else metrics_lib.BY_NAME[kind][name]
    for name in metrics
  ]
  postprocess = {
    'number': postprocessors.number,
    'answer': postprocessors.first_answer,
  }.get(kind)
  if kind == 'number':
    functions.append(metrics_lib.invalid)
  return postprocess, functions


def register(
  name: str,
  read: Callable[[str], dict[str, list[str]]],
  splits: Iterable[str],
  labels: Sequence[str] | None = None,
  metrics: Sequence[str] | None = None,
  rank: bool = False,
) -> None:
  """Registers a task of texts in memory; again under a name replaces it.

  Args:
    name: Of the task.
    read: A split to its 'inputs' and 'targets', called when they are needed.
    splits: The names of the splits.
    labels: All targets of a classification.
    metrics: Names in `metrics.BY_NAME`, or 'macro_f1'; if not given, accuracy
      for a classification and exact_match for other tasks.
    rank: Whether to evaluate a classification by scoring every label, where
      the default is what the model writes.
  """
  read = functools.cache(read)

  def dataset(split, shuffle_files, seed=None):
    texts = read(split)
    rows = tf.data.Dataset.from_tensor_slices(texts)
    if shuffle_files:
      rows = rows.shuffle(len(texts['inputs']), seed=seed)
    return rows

  source = seqio.FunctionDataSource(dataset, splits=list(splits))
  # Counted only when asked for: rows of an unused split are never read.
  source.num_input_examples = lambda split: len(read(split)['inputs'])
  postprocess, functions = _scoring(metrics, labels)
  if labels:
    postprocess = functools.partial(
      postprocessors.label_id, labels=tuple(labels)
    )
  if rank:
    if not labels:
      raise UserError('RANK is True, expected LABEL_NAMES to be scored')
    task = registry.ranking(source, [], labels, postprocess, functions)
  else:
    task = {
      'source': source,
      'preprocessors': registry.tokenized([]),
      'postprocess_fn': postprocess,
      'metric_fns': [*functions, metrics_lib.invalid] if labels else functions,
    }
  seqio.TaskRegistry.remove(name)
  seqio.TaskRegistry.add(name, output_features=registry.features(), **task)


def from_files(
  files: Mapping[str, str | Sequence[str]],
  inputs: str,
  targets: str,
  label_names: Sequence[str] | None = None,
  metrics: Sequence[str] | None = None,
  skip_bad_rows: bool = False,
  rank: bool = False,
  name: str = 'from_files',
) -> str:
  """Registers a task that reads a user's files, and returns its name.

  Args:
    files: For each split a file or several, which may have stars.
    inputs: The template of the inputs, such as 'sentence: {sentence}'.
    targets: The template of the targets.
    label_names: The names of a classification's labels 0, 1, ..., which take
      the label's place in the targets.
    metrics: See `register`.
    skip_bad_rows: Whether bad rows are counted and listed, not an error.
    rank: See `register`.
    name: Of the task.

  Raises:
    ValueError: The arguments do not fit together. What is wrong with a file is
      raised when its split is read.
  """
  if not isinstance(files, Mapping) or not files:
    raise UserError(
      f"TASK_FILES is {files!r}, expected {{'train': 'train.tsv', ...}}"
    )
  paths = {
    split: [one_or_more] if isinstance(one_or_more, str) else list(one_or_more)
    for split, one_or_more in files.items()
  }
  _fields(inputs, 'INPUTS'), _fields(targets, 'TARGETS')

  def read(split):
    found = []
    for path in paths[split]:
      matches = sorted(tf.io.gfile.glob(path)) if '*' in path else [path]
      if not matches:
        raise UserError(
          f'No file matches {path!r} in TASK_FILES. A relative path starts at '
          f'{os.getcwd()}'
        )
      found += matches
    rows = (row for file in found for row in read_rows(file))
    return to_texts(rows, inputs, targets, label_names, skip_bad_rows)

  register(
    name,
    read,
    paths,
    label_names and label_texts(targets, label_names),
    metrics,
    rank,
  )
  return name
