"""A task of your own rows, without Python: TSV, CSV, JSON lines.

    ptune train --gin_file=tasks/from_files.gin \\
      --gin.TASK_FILES="{'train': 'train.tsv', 'validation': 'dev.tsv'}" \\
      --gin.INPUTS="'sentence: {sentence}'" --gin.TARGETS="'{label}'" \\
      --gin.LABEL_NAMES="['negative', 'positive']" ...

`from_files` reads files. `from_rows` takes rows from Python: dicts by column
(for pandas, `frame.to_dict('records')`; a Hugging Face data set as it is), or
pairs of inputs and targets. Both make a `texts.TextTask` by the same rules.

The first line of a TSV or CSV file names the columns; a template has the names
in braces. TSV has no quotes: a tab ends a field, and a line end ends a row. A
CSV field may be in double quotes, with commas and line ends inside. A CSV file
may use semicolons or tabs instead of commas. A line of JSON is an object whose
values are strings, numbers or booleans. Files are UTF-8, local or on gs://.
They may be compressed with gzip (`.gz`). They are kept in memory.

With LABEL_NAMES the task is a classification. In every format, the column in
TARGETS may hold:

    a label's name           checked first
    a label's number         0, 1, ..., also as 1.0, as pandas writes it
    a boolean                true and false in any case: names, or 1 and 0
    -1, nothing or null      the row has no label and is not trained on

NaN, which a DataFrame has for a missing value, is an error in every column.

A number that is also the name of another label is an error. Then make
LABEL_NAMES a dict: the column's value -> the label's name.

A bad row stops the run with an error that names file and line, unless
SKIP_BAD_ROWS is set.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ptune.convert import storage
from ptune.convert.pieces import Vocabulary
from ptune.errors import UserError
from ptune.tasks.rows import BadRow, Row, read_rows
from ptune.tasks.templates import (
  LabelNames,
  Templates,
  templates_of,
  to_texts,
)
from ptune.tasks.texts import Texts, TextTask


def task_of(
  name: str,
  rows: Callable[[str], Iterable[tuple[str, Row | BadRow]]],
  splits: Iterable[str],
  inputs: str,
  targets: str,
  label_names: LabelNames | None,
  skip_bad_rows: bool,
  **settings: Any,
) -> TextTask:
  """Makes a task that reads a split's rows when the split is needed.

  Args:
    name: The task's name.
    rows: Takes a split and yields its rows, each with its location.
    splits: The names of the splits.
    inputs: See `from_files`, also for the next arguments.
    targets: The template of the targets.
    label_names: The names of a classification's labels.
    skip_bad_rows: Whether to count and list bad rows instead of stopping.
    **settings: Further arguments of `texts.TextTask`.
  """
  templates = templates_of(inputs, targets, label_names)
  for macro, value in (
    ('SKIP_BAD_ROWS', skip_bad_rows),
    ('RANK', settings.get('rank', False)),
  ):
    if not isinstance(value, bool):
      raise UserError(f'{macro} is {value!r}, expected True or False')

  def read(split: str) -> Texts:
    return to_texts(
      split, rows(split), inputs, targets, label_names, skip_bad_rows
    )

  def reader(split: str) -> Callable[[], Texts]:
    return lambda: read(split)

  return TextTask(
    name,
    {split: reader(split) for split in splits},
    labels=templates.labels and templates.labels.texts,
    templates=templates,
    **settings,
  )


def from_files(
  files: Mapping[str, str | Sequence[str]],
  inputs: str,
  targets: str,
  label_names: LabelNames | None = None,
  metrics: Sequence[str] | None = None,
  skip_bad_rows: bool = False,
  rank: bool = False,
  name: str = 'from_files',
  vocabulary: Vocabulary | None = None,
  rows: Mapping[str, Iterable[Any]] | None = None,
) -> TextTask:
  """Makes a task that reads a user's files.

  Args:
    files: TASK_FILES: a file or several for each split; `*` is a wildcard.
    inputs: The template of the inputs, such as 'sentence: {sentence}'.
    targets: The template of the targets.
    label_names: The names of a classification's labels 0, 1, ..., which replace
      the label in the targets; or a dict: the column's value -> the name.
    metrics: See `texts.TextTask`.
    skip_bad_rows: Whether to count and list bad rows instead of stopping.
    rank: See `texts.TextTask`.
    name: The task's name.
    vocabulary: See `texts.TextTask`.
    rows: Rows from Python instead of files, by split: see `from_rows`.

  Raises:
    UserError: The arguments do not fit together. Errors in a file are raised
      when its split is read.
  """
  if rows is not None:
    return from_rows(
      rows,
      inputs,
      targets,
      label_names,
      metrics,
      skip_bad_rows,
      rank,
      name,
      vocabulary,
    )
  paths = _paths(files)

  def in_files(split):
    setting = f'TASK_FILES[{split!r}]'
    found = _matching(paths[split], setting)
    rows = itertools.chain.from_iterable(
      read_rows(file, setting) for file in found
    )
    if (first := next(rows, None)) is None:
      raise UserError(
        f'{setting} has {", ".join(map(repr, found))}, with no rows below the'
        ' names of the columns'
      )
    yield first
    yield from rows

  return task_of(
    name,
    in_files,
    paths,
    inputs,
    targets,
    label_names,
    skip_bad_rows,
    metrics=metrics,
    rank=rank,
    vocabulary=vocabulary,
  )


def from_rows(
  rows: Mapping[str, Iterable[Any]],
  inputs: str = '{inputs}',
  targets: str = '{targets}',
  label_names: LabelNames | None = None,
  metrics: Sequence[str] | None = None,
  skip_bad_rows: bool = False,
  rank: bool = False,
  name: str = 'from_rows',
  vocabulary: Vocabulary | None = None,
) -> TextTask:
  """Makes a task of rows from Python.

  Args:
    rows: The rows of each split: dicts by column, or pairs of inputs and
      targets, which become columns of these names.
    inputs: See `from_files`, also for the next arguments.
    targets: The template of the targets.
    label_names: The names of a classification's labels.
    metrics: See `texts.TextTask`.
    skip_bad_rows: Whether to count and list bad rows instead of stopping.
    rank: See `texts.TextTask`.
    name: The task's name.
    vocabulary: See `texts.TextTask`.

  Raises:
    UserError: As `from_files`.
  """
  if not isinstance(rows, Mapping) or not rows:
    raise UserError(f"got {rows!r}, expected {{'train': [...], ...}}")

  return task_of(
    name,
    lambda split: _numbered(split, rows[split]),
    rows,
    inputs,
    targets,
    label_names,
    skip_bad_rows,
    metrics=metrics,
    rank=rank,
    vocabulary=vocabulary,
  )


def _numbered(
  split: str, rows: Iterable[Any]
) -> Iterator[tuple[str, Row | BadRow]]:
  """Yields the location of each row from Python, 'train[7]', and the row."""
  for i, row in enumerate(rows):
    where = f'{split}[{i}]'
    if isinstance(row, Mapping):
      yield where, row
    elif isinstance(row, tuple | list) and len(row) == 2:
      yield where, dict(zip(('inputs', 'targets'), row, strict=True))
    else:
      expected = 'is not a row; expected a dict, or (inputs, targets)'
      shown = ' '.join(repr(row).split())
      yield where, BadRow(f'{shown:.80} {expected}')


def as_jsonl(rows: Iterable[Any], templates: Templates) -> str:
  """Writes rows from Python as JSON lines, which make the same texts.

  Args:
    rows: Rows of a split, as for `from_rows`. Bad rows are left out.
    templates: The templates of the task. Other columns are left out.
  """
  lines = []
  for _, row in _numbered('', rows):
    if not isinstance(row, BadRow):
      with contextlib.suppress(BadRow):
        read = templates.read(row)
        lines.append(json.dumps(read, ensure_ascii=False) + '\n')
  return ''.join(lines)


def _paths(files: Any) -> dict[str, list[str]]:
  """Returns TASK_FILES with a list of files for each split."""
  example = "{'train': 'train.tsv', ...}"
  if not isinstance(files, Mapping) or not files:
    raise UserError(f'TASK_FILES is {files!r}, expected {example}')
  paths = {}
  for split, some in files.items():
    found = [some] if isinstance(some, str | os.PathLike) else some
    good = isinstance(found, Sequence) and all(
      isinstance(file, str | os.PathLike) for file in found
    )
    if not isinstance(split, str) or not good or not found:
      raise UserError(
        f'TASK_FILES has {split!r}: {some!r}, expected the name of a split, and'
        f' a file or a list of files: {example}'
      )
    paths[split] = [os.fspath(file) for file in found]
  return paths


def _matching(paths: Sequence[str], setting: str) -> list[str]:
  found = []
  for path in paths:
    matches = storage.glob(path, setting) if '*' in path else [path]
    if not matches:
      raise UserError(
        f'{setting} is {path!r}, and no file matches. A relative path starts'
        f' at {os.getcwd()}'
      )
    found += matches
  return found
