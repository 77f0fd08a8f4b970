"""Ranks methods by their scores on a task, in a table and in figures."""

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from ptune import methods as methods_lib
from ptune.model.counts import counts
from ptune.model.sizes import SIZES
from ptune.studies.study import of_seeds
from ptune.studies.tables import Result

if TYPE_CHECKING:
  from matplotlib.figure import Figure

# A p-value above this does not count as a difference.
SIGNIFICANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Ranked:
  """A method at its best learning rate, on one task.

  Attributes:
    name: The method.
    rate: The learning rate, followed by ' (edge)' if it was the lowest or
      highest that was tried.
    scores: The score of each seed.
    trained: The number of trained parameters.
    seconds: The time of one training.
    over_seeds: The p-value of the difference from the best method, by a paired
      test over the seeds; None for one seed, or for the best method itself.
    over_rows: The same over the rows of the split; None if no predictions were
      kept, or if some are neither plainly right nor wrong.
  """

  name: str
  rate: str
  scores: tuple[float, ...]
  trained: int
  seconds: float
  over_seeds: float | None = None
  over_rows: float | None = None

  @property
  def mean(self) -> float:
    """The mean score."""
    return float(np.mean(self.scores))

  @property
  def deviation(self) -> float:
    """The standard deviation of the scores; 0 for a single score."""
    return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else 0.0

  @property
  def below(self) -> bool | None:
    """Whether it is worse than the best method; None if that was not tested."""
    if self.over_seeds is None:
      return None
    return max(self.over_seeds, self.over_rows or 0.0) <= SIGNIFICANCE


def rank(
  split: str, results: Sequence[Result], directory: epath.Path
) -> list[Ranked]:
  """Ranks the methods on the task of `results`, the best first.

  Args:
    split: The split that was scored.
    results: The results of the comparison, on one task.
    directory: The directory that their `prompt` paths are relative to.
  """
  found: dict[str, list[Result]] = {}
  for r in sorted(results, key=lambda r: r.seed):
    found.setdefault(r.row, []).append(r)
  ranked, rows = [], {}
  for name, mine in found.items():
    scores = tuple(r.score for r in mine)
    seconds = float(np.mean([r.seconds for r in mine]))
    rate = mine[0].column.rpartition(' at ')[2]
    ranked.append(Ranked(name, rate, scores, mine[0].trained, seconds))
    rows[name] = right(split, mine, directory)
  first, *others = sorted(ranked, key=lambda one: one.mean, reverse=True)
  return [
    first,
    *(
      dataclasses.replace(
        one,
        over_seeds=_chance(first.scores, one.scores),
        over_rows=_chance(rows[first.name], rows[one.name]),
      )
      for one in others
    ),
  ]


def right(
  split: str, results: Sequence[Result], directory: epath.Path
) -> Sequence[float]:
  """The share of the trainings that got each row of the split right.

  Empty if an evaluation kept no predictions, or if some predictions are neither
  plainly right nor wrong.
  """
  shares = []
  for r in results:
    run = directory / r.prompt
    place = run.parent / f'eval_{split}' / of_seeds(run.name, r.seed) / r.task
    file = place / f'predictions-{r.seed}.jsonl'
    lines = file.read_text().splitlines() if file.exists() else []
    shares.append([json.loads(line).get('right') for line in lines])
  if not all(shares) or any(None in share for share in shares):
    return []
  return np.mean(shares, axis=0).tolist()


def _chance(a: Sequence[float], b: Sequence[float]) -> float | None:
  """The p-value of a paired, two-sided t-test; None below two pairs."""
  from scipy import stats

  if len(a) != len(b) or len(a) < 2:
    return None
  apart = np.subtract(a, b)
  if not apart.std():  # The test divides by the standard deviation.
    return 1.0 if not apart.any() else 0.0
  return float(stats.ttest_rel(a, b).pvalue)


def table(ranked: Sequence[Ranked]) -> str:
  """A table in Markdown."""

  def told(one: Ranked) -> str:
    if one is ranked[0]:
      return 'the best'
    if one.below is None:
      return 'not tested: one seed'
    rows = '' if one.over_rows is None else f', rows {one.over_rows:.2g}'
    how = 'below' if one.below else 'tie'
    return f'{how} (p: seeds {one.over_seeds:.2g}{rows})'

  lines = [
    '| method | trained | seconds | learning rate | score | of each seed |'
    ' against the best |',
    '|---|---:|---:|---:|---:|---|---|',
  ]
  for one in ranked:
    mean = f'{one.mean:.1f}'
    if len(one.scores) > 1:
      mean += f' ± {one.deviation:.1f}'
    each = ', '.join(f'{score:.1f}' for score in one.scores)
    lines.append(
      f'| {one.name} | {one.trained:,} | {one.seconds:.0f} | {one.rate} |'
      f' {mean} | {each} | {told(one)} |'
    )
  return '\n'.join([*lines, ''])


def draw_parameters(names: Sequence[str]) -> 'Figure':
  """Figure 4: the share of parameters that methods train, by T5 1.1 size."""
  from matplotlib import figure

  fig = figure.Figure(figsize=(6.5, 5.5), layout='constrained')
  axes = fig.subplots()
  configs = [c for name, c in SIZES.items() if name.startswith('t5_1_1_')]
  known = methods_lib.functions()
  ends = []
  for name in names:
    pairs = [counts(config, known[name]()) for config in configs]
    x = [whole for _, whole in pairs]
    y = [100 * trained / whole for trained, whole in pairs]
    axes.plot(x, y, 'o-', markersize=3, linewidth=1)
    ends.append((y[-1], x[-1], name))
  axes.set(
    xscale='log',
    yscale='log',
    xlabel='model parameters (T5 1.1 small to XXL)',
    ylabel='trained parameters, % of the model',
    title='Trained parameters of each method, with its defaults',
  )
  _label(axes, ends)
  axes.grid(alpha=0.3)
  return fig


def _label(axes: Any, ends: Sequence[tuple[float, float, str]]) -> None:
  """Writes the lines' names at their ends; moves close names apart."""
  low, high = np.log10(axes.get_ylim())
  step, last = (high - low) / 32, -np.inf
  for y, x, name in sorted(ends):
    last = max(np.log10(y), last + step)
    axes.annotate(
      name,
      (x, y),
      (x * 1.25, 10**last),
      va='center',
      fontsize='small',
      arrowprops={'arrowstyle': '-', 'linewidth': 0.3},
    )
  left, right = axes.get_xlim()
  axes.set_xlim(left, right * 8)


def pareto(ranked: Sequence[Ranked]) -> list[Ranked]:
  """The methods that none with as few parameters beats, by parameters."""
  front: list[Ranked] = []
  for one in sorted(ranked, key=lambda r: (r.trained, -r.mean)):
    if not front or one.mean > front[-1].mean:
      front.append(one)
  return front


def draw_pareto(ranked: Sequence[Ranked], title: str) -> 'Figure':
  """Draws scores against trained parameters, and the line of `pareto`."""
  from matplotlib import figure

  fig = figure.Figure(figsize=(6.5, 5), layout='constrained')
  axes = fig.subplots()
  for one in ranked:
    axes.errorbar(
      one.trained, one.mean, one.deviation, fmt='o', capsize=3, color='C0'
    )
  front = pareto(ranked)
  axes.step(
    [one.trained for one in front],
    [one.mean for one in front],
    where='post',
    color='C1',
    linewidth=1,
    label='best score with at most this many parameters',
  )
  axes.set(
    xscale='log',
    xlabel='trained parameters',
    ylabel='score',
    title=f'Methods at their best learning rates\n{title}',
  )
  axes.margins(x=0.15)
  fig.legend(loc='outside lower center')
  axes.grid(alpha=0.3)
  fig.draw_without_rendering()  # Places axes and points.
  _name(axes, ranked)
  return fig


def _name(axes: Any, ranked: Sequence[Ranked]) -> None:
  """Writes the points' names beside them; keeps close names apart."""
  # Offsets in points: right of the point, above, below, and further away.
  offsets = [(6, y) for y in (2, 12, -10, 22, -20, 32, -30)]
  taken: list[tuple[float, float, float]] = []
  for one in ranked:
    place = axes.transData.transform((one.trained, one.mean))
    x, y = place * 72 / axes.figure.dpi
    width = 5.5 * len(one.name)

    def free(offset, x=x, y=y, width=width):
      left, bottom = x + offset[0], y + offset[1]
      return all(
        left > end or left + width < start or abs(bottom - other) > 10
        for start, end, other in taken
      )

    offset = next(filter(free, offsets), offsets[0])
    left = x + offset[0]
    taken.append((left, left + width, y + offset[1]))
    axes.annotate(
      one.name,
      (one.trained, one.mean),
      offset,
      textcoords='offset points',
      fontsize='small',
      arrowprops={'arrowstyle': '-', 'linewidth': 0.3},
    )
