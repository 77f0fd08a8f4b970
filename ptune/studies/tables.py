"""The scores of many trainings as CSV, as a table and as a figure."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  from matplotlib.figure import Figure

# The scores by row and column, one for each seed.
Grid = dict[str, dict[str, list[float]]]


@dataclasses.dataclass(frozen=True)
class Result:
  """A line of results.csv.

  Attributes:
    row, column: The place in the table.
    task: The task that was trained on.
    seed: The seed of the training; -1 for a score of all seeds together.
    score: The score on the validation split, of the best evaluation by
      BEST_METRIC.
    parameters: The number of the model's parameters.
    trained: The number of trained parameters, in the model or added to it.
    prompt: The path of the trained parameters.
    setting: A hash of all else that decides the score.
    seconds: The training time. The trainings of one program share their time
      evenly. It leaves out compilation and evaluation.
  """

  row: str
  column: str
  task: str
  seed: int
  score: float
  parameters: int
  trained: int
  prompt: str
  setting: str = ''
  seconds: float = 0.0


def read(text: str) -> list[Result]:
  """The results in a results.csv."""
  kinds = {f.name: f.type for f in dataclasses.fields(Result)}
  make = {str: str, int: int, float: float}
  return [
    Result(**{name: make[kinds[name]](value) for name, value in line.items()})
    for line in csv.DictReader(io.StringIO(text))
  ]


def dump(results: Sequence[Result]) -> str:
  """The text of a results.csv."""
  text = io.StringIO()
  names = [f.name for f in dataclasses.fields(Result)]
  writer = csv.DictWriter(text, names, lineterminator='\n')
  writer.writeheader()
  writer.writerows(dataclasses.asdict(x) for x in results)
  return text.getvalue()


def table(results: Sequence[Result]) -> Grid:
  """The scores of each row and column, one for each seed: means over tasks."""
  found: dict[tuple[str, str], dict[int, list[float]]] = {}
  for r in results:
    found.setdefault((r.row, r.column), {}).setdefault(r.seed, []).append(
      r.score
    )
  grid: Grid = {}
  for (row, column), seeds in found.items():
    scores = [float(np.mean(x)) for _, x in sorted(seeds.items())]
    grid.setdefault(row, {})[column] = scores
  return grid


def columns(grid: Grid) -> list[str]:
  """The names of the columns, in the order in which they appear."""
  return list(dict.fromkeys(c for row in grid.values() for c in row))


def markdown(grid: Grid) -> str:
  """The table: the mean and, for several seeds, the standard deviation."""

  def told(scores: list[float] | None) -> str:
    if not scores:
      return '-'
    if len(scores) == 1:
      return f'{scores[0]:.1f}'
    return f'{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}'

  names = columns(grid)
  lines = [f'| | {" | ".join(names)} |', '|---' + '|---:' * len(names) + '|']
  for row, cells in grid.items():
    values = ' | '.join(told(cells.get(name)) for name in names)
    lines.append(f'| {row} | {values} |')
  return '\n'.join([*lines, ''])


def _rounded(count: int) -> str:
  """581632 -> 0.6 M, 11135332352 -> 11.1 B."""
  size, unit = (1e9, 'B') if count >= 1e9 else (1e6, 'M')
  return f'{count / size:.1f} {unit}'


def draw(grid: Grid, title: str, x: Mapping[str, int] | None) -> 'Figure':
  """Draws mean and standard deviation, with a line for each row, against x.

  Args:
    grid: The scores.
    title: The title of the figure.
    x: The number of parameters of each column, if the columns are models. None
      draws each column as a series over the rows; long row names are on the y
      axis.
  """
  from matplotlib import figure

  fig = figure.Figure(figsize=(6, 3.8), layout='constrained')
  axes = fig.subplots()
  rows = list(grid)
  flat = x is None and sum(map(len, rows)) > 60
  score = 'score on the validation split'
  if x is not None:
    series = {
      row: {x[name]: scores for name, scores in cells.items()}
      for row, cells in grid.items()
    }
    axes.set(xscale='log', xlabel='parameters of the model')
    names = [f'{name}\n{_rounded(count)}' for name, count in x.items()]
    axes.set_xticks(list(x.values()), names)
    axes.set_xticks([], minor=True)
  else:
    names = columns(grid)
    series = {
      name: {
        rows.index(row) + 0.06 * (i - (len(names) - 1) / 2): cells[name]
        for row, cells in grid.items()
        if name in cells
      }
      for i, name in enumerate(names)
    }
    ends = -0.5, len(rows) - 0.5
    if flat:
      labels = [row.replace(' -> ', '\n-> ') for row in rows]
      axes.set_yticks(range(len(rows)), labels, fontsize='small')
      axes.set_ylim(*reversed(ends))
    else:
      axes.set_xticks(range(len(rows)), rows)
      axes.set_xlim(*ends)
  for name, points in series.items():
    places = sorted(points)
    mean = [np.mean(points[p]) for p in places]
    spread = [
      np.std(points[p], ddof=1) if len(points[p]) > 1 else 0 for p in places
    ]
    how = {'fmt': 'o-' if x else 'o', 'capsize': 3, 'label': name}
    if flat:
      axes.errorbar(mean, places, xerr=spread, **how)
    else:
      axes.errorbar(places, mean, spread, **how)
  axes.set(title=title, **{'xlabel' if flat else 'ylabel': score})
  axes.title.set_fontsize('medium')
  axes.legend()
  axes.grid(alpha=0.3)
  return fig
