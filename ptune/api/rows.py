"""Rows of users: lists, DataFrames, data sets, files, names of tasks."""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from ptune.config import flags
from ptune.convert.pieces import Vocabulary
from ptune.errors import UserError
from ptune.tasks import files
from ptune.tasks.labels import cut
from ptune.tasks.rows import listed as listed_columns
from ptune.tasks.templates import Odd, columns_of
from ptune.tasks.texts import TextTask
from ptune.training import run_file

# Represents, in TASK_FILES, rows that are not in a file.
PLACE = '(rows of Python).jsonl'

EXPECTED = (
  'pairs of input and target, dicts, a pandas DataFrame, a Hugging Face'
  ' Dataset, the path of a .tsv, .csv or .jsonl file, or the name of a SeqIO'
  ' task'
)
EXPECTED_FILE = f'rows, or a file that ends in {", ".join(flags.SUFFIXES)}'
# The inputs of a model.
QUESTIONS = 'a text, or a list of texts or dicts'


def taken(name: str, data: Any) -> dict[str, Any]:
  """The rows of one split, as a path or as a list.

  Args:
    name: The name of the argument, which is also that of the split.
    data: The argument.

  Raises:
    UserError: If it has no rows, or is something else.
  """
  if isinstance(data, str | os.PathLike):
    file = os.fspath(data)
    # Only `train` may be the name of a SeqIO task, which has all splits.
    if not flags.is_file(file) and (name != 'train' or file is not data):
      raise UserError(f'{name} is {file!r}; expected {EXPECTED_FILE}')
    return {name: file}
  if isinstance(data, Rows):
    return {name: data}
  return {name: Rows(name, data)}


class Rows(Sequence):
  """Rows in memory. Gin neither copies nor writes them."""

  def __init__(self, name: str, data: Any):
    """Reads the rows of a DataFrame, a data set or any iterable."""
    self.label_names = _label_names(data)
    self._rows = listed(name, data)

  def __getitem__(self, index):
    return self._rows[index]

  def __len__(self) -> int:
    return len(self._rows)

  def __deepcopy__(self, memo):
    return self

  def __repr__(self) -> str:
    return f'<{len(self)} rows>'


def listed(name: str, data: Any, expected: str = EXPECTED) -> Sequence[Any]:
  """Rows as a sequence.

  Args:
    name: The name of the argument, for messages.
    data: The argument.
    expected: What it may be, for messages.

  Raises:
    UserError: If it has no rows, or is something else.
  """
  if isinstance(data, Mapping) and any(
    isinstance(x, Iterable) and not isinstance(x, str) for x in data.values()
  ):
    raise UserError(
      f'{name} is {type(data).__name__} with {listed_columns(data)}; give one'
      f' of them, such as {name}=data[{next(iter(data))!r}]'
    )
  single = isinstance(data, str | bytes | os.PathLike | Mapping)
  if single or not isinstance(data, Iterable) or getattr(data, 'ndim', 1) == 0:
    raise UserError(
      f'{name} is {type(data).__name__} {data!r:.80}; expected {expected}'
    )
  # A pandas DataFrame, without importing pandas.
  if hasattr(data, 'to_dict') and hasattr(data, 'columns'):
    data = data.rename(columns=str)
    if not data.columns.is_unique:
      raise UserError(
        f'{name} has columns of the same name: {listed_columns(data.columns)}'
      )
    data = data.to_dict('records')
  rows = data if isinstance(data, Sequence) else list(data)
  if not len(rows):
    raise UserError(f'{name} has no rows; expected at least one')
  return rows


def texts(name: str, data: Any, expected: str = 'a list of texts') -> list[str]:
  """The items of a list of texts.

  Args:
    name: The name of the argument, for messages.
    data: The argument.
    expected: What it may be, for messages.

  Raises:
    UserError: If it is empty, no list, or not all of it are texts.
  """
  found = listed(name, data, expected)
  for i, text in enumerate(found):
    if not isinstance(text, str):
      raise UserError(f'{name}[{i}] is {text!r:.80}; expected a text')
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise UserError(f'{name}[{i}] is not Unicode: {error}') from None
  return list(map(str, found))  # NumPy's texts become Python's.


def warn_of_odd(texts: Sequence[str], template: str) -> None:
  """Warns of inputs that are allowed and seldom meant; see `Odd`."""
  odd = Odd('inputs', template)
  for i, text in enumerate(texts):
    odd.see(f'inputs[{i}]', text)
  odd.warn('inputs')


def _label_names(data: Any) -> dict[str, list[str]]:
  """The names of a Hugging Face Dataset's labels, by column."""
  features = getattr(data, 'features', None) or {}
  return {
    column: list(feature.names)
    for column, feature in features.items()
    if getattr(feature, 'names', None)
  }


def settings(
  rows: Mapping[str, Any], directory: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
  """The settings of `flags.expand` for some rows, by split.

  Args:
    rows: The rows, from `taken`.
    directory: The run that keeps rows from Python; None if they are not kept.

  Raises:
    UserError: If files and rows are mixed.
  """
  in_memory = {split for split, x in rows.items() if isinstance(x, Rows)}
  if not in_memory:
    return dict(rows)
  if in_memory != set(rows):
    raise UserError(
      f'{sorted(in_memory)} are rows, and'
      f' {sorted(set(rows) - in_memory)} files or tasks; give all as one kind'
    )
  if directory is None:
    return dict.fromkeys(rows, PLACE)
  return {split: os.path.join(directory, _file(split)) for split in rows}


def _file(split: str) -> str:
  return flags.ROWS.format(split=split)


def bind(rows: Mapping[str, Any]) -> None:
  """Gives gin rows in memory, for `files.from_files`."""
  import gin

  if (given := in_memory(rows)) is not None:
    gin.bind_parameter('files.from_files.rows', given)


def in_memory(rows: Mapping[str, Any]) -> Mapping[str, Any] | None:
  """The rows for `files.from_files`, by split; None if they are in files."""
  if any(isinstance(x, Rows) for x in rows.values()):
    return _Unwritten(rows)
  return None


def keep(
  rows: Mapping[str, Any], task: TextTask, directory: str | os.PathLike[str]
) -> None:
  """Lets the run write rows in memory to its directory, for later programs.

  Args:
    rows: The rows by split, which `bind` got.
    task: The task of these rows.
    directory: The directory of the run.

  Raises:
    UserError: If an earlier start of the run got other rows.
  """
  import gin

  assert task.templates is not None
  kept = {
    _file(split): files.as_jsonl(some, task.templates)
    for split, some in rows.items()
    if isinstance(some, Rows)
  }
  for name, text in kept.items():
    there = run_file.run_directory(directory) / name
    if there.exists():
      _check_same(text, there)
  if kept:
    gin.bind_parameter('settings.Saving.rows', _Unwritten(kept))


def _check_same(text: str, there: epath.Path) -> None:
  """Raises UserError at the first row that differs from those of the run."""
  run, theirs = there.parent.parent, there.read_text()
  if text == theirs:
    return
  pairs = itertools.zip_longest(text.split('\n')[:-1], theirs.split('\n')[:-1])
  for number, (ours, earlier) in enumerate(pairs):
    if ours != earlier:
      raise UserError(
        f'{there.stem}[{number}] is {ours or "missing"}, but the run in {run}'
        f' was started with {earlier or "no such row"}. Give the same rows to'
        ' resume that run, or another model_dir'
      )


class _Unwritten(dict):
  """A value that gin neither copies nor writes."""

  def __deepcopy__(self, memo):
    return self

  def __repr__(self) -> str:
    return f'<{", ".join(self)}>'


def check_labels(
  labels: Sequence[str] | None, vocabulary: Vocabulary, length: int
) -> list[str]:
  """The labels of a classification.

  Args:
    labels: The argument.
    vocabulary: The vocabulary of the answers.
    length: The most tokens of an answer.

  Raises:
    UserError: If there are not two, the vocabulary writes some in the same way,
      or some are longer than an answer.
  """
  expected = "a list of two texts or more, such as ['negative', 'positive']"
  found = texts('labels', labels, expected)
  if len(set(found)) < 2:
    raise UserError(f'labels is {labels!r}; expected {expected}')
  by_text: dict[str, list[str]] = {}
  for label in found:
    by_text.setdefault(vocabulary.decode(vocabulary.encode(label)), []).append(
      label
    )
  wrong = [same for same in by_text.values() if len(same) > 1]
  if wrong or '' in by_text:
    raise UserError(
      f'labels: the vocabulary cannot tell apart or cannot write'
      f' {[*wrong, *by_text.get("", [])]}; choose other labels'
    )
  if longer := cut(found, vocabulary, length):
    raise UserError(longer)
  return found


def prepared(
  flag_values: Mapping[str, Any],
  rows: Mapping[str, Any],
  directory: str | os.PathLike[str],
) -> dict[str, Any]:
  """Adds default templates and labels to the settings of a training.

  Args:
    flag_values: The settings of the user.
    rows: The rows by split, from `taken`.
    directory: The directory of the run.
  """
  given = {**flag_values, **settings(rows, directory)}
  train = rows['train']
  if isinstance(train, str) and not flags.is_file(train):
    flags.check_task(train, given)
    return given
  given.setdefault('inputs', '{inputs}')
  given.setdefault('targets', '{targets}')
  column = columns_of(given['targets'], 'TARGETS')[0]
  names = [
    some.label_names[column]
    for some in rows.values()
    if isinstance(some, Rows) and column in some.label_names
  ]
  if names and 'label_names' not in given:
    given.setdefault('labels', names[0])
  for split, some in rows.items():
    check_order(split, some, column, given.get('labels'))
  return given


def check_order(split: str, rows: Any, column: str, labels: Any) -> None:
  """Refuses a data set whose numbers mean other labels.

  Args:
    split: The name of the argument with the rows.
    rows: The rows, from `taken`.
    column: The column of the labels.
    labels: The labels 0, 1, ... of the task. A data set may call them by other
      names, but not by the same names in another order.
  """
  names = rows.label_names.get(column) if isinstance(rows, Rows) else None
  if not names or not isinstance(labels, list | tuple):
    return
  if flags.reordered(labels, names):
    raise UserError(
      f'{split} has the labels {names} in column {column!r}, and labels are'
      f' {list(labels)}, so the numbers in the column would mean other labels.'
      f' Use one order'
    )
