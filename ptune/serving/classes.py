"""How well a model recognises each class of a classification.

    classes-<step>.csv      precision, recall, F1 and support of each class
    confusion-<step>.csv    rows are labels, columns are predictions
    confusion-<step>.png    the same as a picture

A prediction that is not a label of the task counts as OTHER.
"""

import collections
import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ptune.host.columns import aligned
from ptune.host.files import write_atomically
from ptune.tasks.metrics import UNLABELLED

OTHER = '(other)'
# More columns than this are too wide for a terminal.
WIDEST = 12
# With more distinct targets than this, the task is not a classification.
MOST = 50

Pair = tuple[str, str]  # The names of the label and of the prediction.


class Class(NamedTuple):
  """One class; precision, recall and F1 from 0 to 100."""

  label: str
  precision: float
  recall: float
  f1: float
  support: int  # Rows that have this label.


def pairs(records: Sequence[Mapping[str, Any]]) -> list[Pair]:
  """The label and the prediction of each row, by their names.

  Args:
    records: See `predictions.write`. If every label of a row was scored, the
      row has one record for each label.

  Returns:
    One pair for each labelled row; an empty list if the task is not a
    classification.
  """
  first = records[0].get('target') if records else None
  if isinstance(first, Mapping) and 'candidate' in first:
    return _ranked(records)
  names: dict[Any, str] = {}
  found = []
  for record in records:
    target, answer = record.get('target'), record.get('prediction')
    if not isinstance(target, str | int) or not isinstance(answer, str | int):
      return []
    if target not in (-1, UNLABELLED):
      names[target] = name(record)
      found.append((target, answer))
  # Text targets are classes if they are few and occur several times each.
  # Numeric targets are always classes.
  texts = [target for target, _ in found if isinstance(target, str)]
  if len(names) > (min(MOST, len(found) // 2) if texts else MOST):
    return []
  return [(names[t], names.get(a, OTHER)) for t, a in found]


def name(record: Mapping[str, Any]) -> str:
  """The text of a row's target, which SeqIO gives as bytes."""
  text = record.get('targets', record.get('target'))
  return text.decode() if isinstance(text, bytes) else str(text)


def _ranked(records: Sequence[Mapping[str, Any]]) -> list[Pair]:
  """Pairs of rows whose labels were all scored: the best label is predicted."""
  names, rows = {}, collections.defaultdict(list)
  for record in records:
    scored = record['target']
    if not isinstance(scored['candidate'], str | int):
      return []  # For example, a label for each answer to one question.
    names[scored['candidate']] = name(record)
    rows[scored['row']].append((float(record['score']), scored))
  found = []
  for row in rows.values():
    best = max(row, key=lambda pair: pair[0])[1]
    if best['target'] in names:
      found.append((names[best['target']], names[best['candidate']]))
  return found


def confusion(found: Sequence[Pair]) -> tuple[list[str], np.ndarray]:
  """The confusion matrix.

  Returns:
    The names of the classes, with OTHER last if it occurs, and the counts
    [label, prediction].
  """
  labels = sorted({label for label, _ in found})
  answers = {answer for _, answer in found} - {*labels, OTHER}
  names = [*labels, *sorted(answers)]
  if any(answer == OTHER for _, answer in found):
    names.append(OTHER)
  index = {name: i for i, name in enumerate(names)}
  counts = np.zeros((len(names), len(names)), np.int64)
  for label, answer in found:
    counts[index[label], index[answer]] += 1
  return names, counts


def table(names: Sequence[str], counts: np.ndarray) -> list[Class]:
  """Precision, recall, F1 and support of each class that has rows."""
  classes = []
  for i, name in enumerate(names):
    right, support = counts[i, i], int(counts[i].sum())
    answered = counts[:, i].sum()
    if not support:
      continue
    # 0 for a class that was never predicted, as in scikit-learn.
    precision = 100 * right / answered if answered else 0.0
    f1 = 200 * right / (answered + support)
    recall = 100 * right / support
    classes.append(
      Class(name, float(precision), float(recall), float(f1), support)
    )
  return classes


def write(
  directory: epath.Path, step: int | str, records: Iterable[Mapping[str, Any]]
) -> None:
  """Writes the files in the module's docstring, unless there are no classes.

  Args:
    directory: An existing directory.
    step: The step of the predictions.
    records: See `pairs`.
  """
  found = pairs(list(records))
  if not found:
    return
  names, counts = confusion(found)
  rows = [
    (c.label, *(f'{x:.2f}' for x in c[1:4]), c.support)
    for c in table(names, counts)
  ]
  _csv(directory / f'classes-{step}.csv', [Class._fields, *rows])
  _csv(
    directory / f'confusion-{step}.csv',
    [('label', *names), *zip(names, *counts.T.tolist(), strict=True)],
  )
  buffer = io.BytesIO()
  draw(names, counts).savefig(buffer, format='png', dpi=120)
  write_atomically(directory / f'confusion-{step}.png', buffer.getvalue())


def read(directory: os.PathLike[str], step: int | str) -> list[Class]:
  """Reads the classes that `write` wrote; [] if it wrote none."""
  file = epath.Path(directory) / f'classes-{step}.csv'
  if not file.exists():
    return []
  lines = csv.DictReader(io.StringIO(file.read_text()))
  return [
    Class(
      line['label'],
      *(float(line[k]) for k in ('precision', 'recall', 'f1')),
      int(line['support']),
    )
    for line in lines
  ]


def text(directory: os.PathLike[str], step: int | str) -> str:
  """What `write` wrote, as two tables for a terminal; '' if it wrote none.

  The confusion matrix is left out if it has more than WIDEST columns.
  """
  found = read(directory, step)
  if not found:
    return ''
  head = ('class', 'precision', 'recall', 'F1', 'support')
  rows = [
    (c.label, *(f'{x:.1f}' for x in c[1:4]), str(c.support)) for c in found
  ]
  lines = aligned([head, *rows], right={1, 2, 3, 4})
  matrix = (epath.Path(directory) / f'confusion-{step}.csv').read_text()
  (_, *names), *counts = csv.reader(io.StringIO(matrix))
  if len(names) <= WIDEST:
    # A row of zeros is an answer that is the label of no row.
    counts = [row for row in counts if any(map(int, row[1:]))]
    cells = [('label \\ answer', *names), *counts]
    lines += ['', *aligned(cells, right=range(1, len(names) + 1))]
  return '\n'.join(lines)


def draw(names: Sequence[str], counts: np.ndarray):
  """Draws the counts as a matplotlib Figure; shades are shares of a row."""
  from matplotlib import figure

  shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  size = 1.6 + 0.55 * len(names)
  fig = figure.Figure(figsize=(size + 0.8, size), layout='constrained')
  axes = fig.subplots()
  axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
  axes.set(xlabel='answer', ylabel='label')
  axes.set_xticks(range(len(names)), names, rotation=45, ha='right')
  axes.set_yticks(range(len(names)), names)
  if len(names) <= 20:  # With more classes, numbers are too small to read.
    for (row, column), count in np.ndenumerate(counts):
      dark = shares[row, column] > 0.5
      axes.text(
        column,
        row,
        str(count),
        ha='center',
        va='center',
        color='white' if dark else 'black',
      )
  return fig


def _csv(path: epath.Path, rows: Iterable[Sequence[Any]]) -> None:
  text = io.StringIO()
  csv.writer(text, lineterminator='\n').writerows(rows)
  write_atomically(path, text.getvalue())
