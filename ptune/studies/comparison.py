"""`ptune study methods`: every method, on the same model and tasks.

The study has two parts, for each task by itself:

1. The search. Every method is trained with one seed at as many learning rates:
   the rate of its file in gin/methods/ times each of the same few factors. The
   rate with the best score on the validation split is chosen.
2. The comparison. Every method is trained at its rate with new seeds, and
   scored on the test split. The validation split also chooses the step of each
   run; the test split chooses nothing.

A table for each task ranks the methods, with the parameters that they train,
the seconds of a training and the rate. Two paired t-tests compare each method
with the best one: over the seeds, and over the rows of the test split, where a
row counts how many of the seeds got it right. A method is below the best only
if both tests say so. Otherwise the two are tied.

    parameters.png     figure 4 of Lester et al. 2021: what methods train,
                       against the size of the model
    pareto_TASK.png    the score against the parameters that are trained
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from ptune import methods as methods_lib
from ptune.errors import UserError, check_counts
from ptune.model.adapters import Method
from ptune.model.counts import counts
from ptune.model.sizes import SIZES
from ptune.studies.paper import Setting
from ptune.studies.study import Cell, Study, of_seeds
from ptune.studies.tables import Result
from ptune.tasks.texts import TextTask
from ptune.training import optim

if TYPE_CHECKING:
  from matplotlib.figure import Figure

# A difference is none if it is as likely as this by chance.
SIGNIFICANCE = 0.05
# Of the search: none of the seeds whose scores are reported.
SEARCH_SEED = 1000
# Follows a rate that is the lowest or highest one of the search.
EDGE = ' (edge)'


def offsets(
  initial_step: int = 0, learning_rate: Any = 0.3, ratio: float = 1 / 300
):
  """AdamW, at a rate of their own for what is added to the inputs.

  `ratio` is that of the files of gin/methods/.
  """
  rate = learning_rate
  own = (lambda step: ratio * rate(step)) if callable(rate) else ratio * rate
  rates = {'encoder/offset/*': own}
  return optim.grouped(initial_step, rate, optim.adamw, rates)


# Optimizer and learning rate, as in gin/methods/.
RECIPES: Mapping[str, tuple[Callable[..., Any], float]] = {
  'prompt': (optim.adafactor, 0.3),
  'superpos': (optim.adamw, 0.3),
  'ulpt': (optim.adamw, 0.3),
  'dept': (offsets, 0.3),
  'adept': (offsets, 0.3),
  'smop': (optim.adafactor, 0.3),
  'p_tuning': (optim.adamw, 0.001),
  'residual': (optim.adamw, 0.01),
  'decoder_prompt': (optim.adafactor, 0.3),
  'per_layer': (optim.adafactor, 0.3),
  'prefix': (optim.adamw, 0.03),
  'ia3': (optim.adafactor, 0.003),
  'lora': (optim.adamw, 0.001),
  'bottleneck': (optim.adamw, 0.001),
  'norms': (optim.adamw, 0.003),
  'full': (optim.relative_adam, 0.003),
}


def method_of(name: str, setting: Setting) -> Method:
  """A method with its defaults, and prompts in the length of the setting.

  DePT and ADePT have prompts of 2/5 of that, and SMoP four of 1/4, so that each
  has about as many prompt rows as in its paper beside a plain prompt.
  """
  length = setting.prompt_length
  sized = {
    **dict.fromkeys(
      ('superpos', 'ulpt', 'p_tuning', 'residual', 'decoder_prompt'), length
    ),
    'dept': max(2 * length // 5, 1),
    'adept': max(2 * length // 5, 1),
    'smop': max(length // 4, 1),
  }
  settings: dict[str, Any] = {}
  if name in sized:
    settings['length'] = sized[name]
  if name == 'prompt':
    settings |= {'length': length, 'init': setting.init}
  if name == 'dept':
    settings['positions'] = setting.task_feature_lengths['inputs']
  return methods_lib.functions()[name](**settings)


def methods(
  setting: Setting,
  names: Sequence[str] | None = None,
  factors: Sequence[float] = (0.3, 1.0, 3.0),
  steps: int | None = None,
  evaluations: int = 4,
) -> Study:
  """Every method of RECIPES, at the best of as many learning rates.

  Args:
    setting: The models and tasks; the usual model is taken.
    names: Only these methods.
    factors: What the learning rate of each is multiplied by in the search.
    steps: Of each training; those of the setting's prompts if not given.
    evaluations: How often each training is evaluated, evenly.

  Raises:
    ValueError: If a method is unknown, there is none or no factor, or a task of
      files has no test split.
  """
  chosen = list(RECIPES) if names is None else list(names)
  unknown = sorted(set(chosen) - set(RECIPES))
  if unknown or not chosen or not factors:
    raise UserError(
      f'METHODS is {chosen} with FACTORS {list(factors)}; choose at least one'
      f' factor, and at least one of {list(RECIPES)}'
    )
  check_counts(evaluations=evaluations)
  if steps is not None:
    check_counts(TRAIN_STEPS=steps)
    tuning = dataclasses.replace(setting.prompt, steps=steps)
    setting = dataclasses.replace(setting, prompt=tuning)
  for task in setting.tasks:
    if isinstance(task, TextTask) and setting.test not in task.splits:
      raise UserError(
        f'task {task.name!r} has the splits {list(task.splits)}; the study'
        f' reports the scores of {setting.test!r}, so TASK_FILES must have it'
      )
  search = [
    _cell(setting, name, task, factor)
    for name in chosen
    for task in setting.tasks
    for factor in factors
  ]
  return setting.study(
    'methods',
    'Methods: the search (validation split, by factors of their learning'
    f' rates), and scores of the {setting.test} split at the best one',
    search,
    evaluations=evaluations,
    timed=True,
    then=functools.partial(_at_best, setting, search),
    report=functools.partial(report, setting.test),
  )


def _cell(
  setting: Setting, name: str, task: str | TextTask, factor: float
) -> Cell:
  """A method in the search, at one learning rate."""
  optimizer, rate = RECIPES[name]
  tuning = dataclasses.replace(
    setting.prompt, learning_rate=rate * factor, optimizer=optimizer
  )
  return Cell(
    name,
    f'{task} x {factor:g}',
    setting.usual,
    f'{name} x {factor:g}',
    task,
    method_of(name, setting),
    tuning,
    seeds=(SEARCH_SEED,),
  )


def _at_best(
  setting: Setting, search: Sequence[Cell], results: Sequence[Result]
) -> list[Cell]:
  """The comparison: each method and task at the best rate of the search.

  Of rates that score the same, the one nearest to that of the gin file.
  """
  scores = {(r.row, r.column): r.score for r in results}
  groups: dict[tuple[str, str], list[Cell]] = {}
  for cell in search:
    groups.setdefault((cell.row, str(cell.task)), []).append(cell)
  cells = []
  for (name, task), ones in groups.items():
    rates = [cell.tuning.learning_rate for cell in ones]

    def quality(cell, usual=RECIPES[name][1]):
      away = abs(math.log(cell.tuning.learning_rate / usual))
      return scores[cell.row, cell.column], -away

    best = max(ones, key=quality)
    rate = f'{best.tuning.learning_rate:g}'
    if len(rates) > 1 and best.tuning.learning_rate in (
      min(rates),
      max(rates),
    ):
      rate += EDGE
    cells.append(
      dataclasses.replace(
        best,
        column=f'{task} {setting.test} at {rate}',
        split=setting.test,
        seeds=None,
      )
    )
  return cells


@dataclasses.dataclass(frozen=True)
class Ranked:
  """A method at its best learning rate, on one task.

  Attributes:
    name: The method.
    rate: The learning rate, with EDGE behind it if none beyond was tried.
    scores: Of each seed.
    trained: Parameters.
    seconds: Of one training.
    over_seeds: The p-value of its difference from the best, by a paired test
      over the seeds; None if there is one seed, or for the best itself.
    over_rows: The same over the rows of the split; None if no predictions were
      kept, or none that are plainly right or wrong.
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
    """The standard deviation of the scores; 0 of one."""
    return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else 0.0

  @property
  def below(self) -> bool | None:
    """Whether it is worse than the best; None if that was not tested."""
    if self.over_seeds is None:
      return None
    return max(self.over_seeds, self.over_rows or 0.0) <= SIGNIFICANCE


def rank(
  split: str, results: Sequence[Result], directory: epath.Path
) -> list[Ranked]:
  """The methods on the task of `results`, the best first.

  Args:
    split: What was scored.
    results: Of the comparison, on one task.
    directory: What their `prompt` is in.
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
  """For each row of the split, the share of the trainings that got it right.

  Empty if an evaluation has kept no predictions, or some that are neither
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
  """The p-value of a paired, two-sided t-test; None of fewer than two pairs."""
  from scipy import stats

  if len(a) != len(b) or len(a) < 2:
    return None
  apart = np.subtract(a, b)
  if not apart.std():  # The test divides by it.
    return 1.0 if not apart.any() else 0.0
  return float(stats.ttest_rel(a, b).pvalue)


def report(
  split: str, results: Sequence[Result], directory: epath.Path
) -> tuple[str, dict[str, 'Figure']]:
  """The ranking on each task, and figures by name."""
  texts, drawn, names = [], {}, dict.fromkeys(r.row for r in results)
  for task in dict.fromkeys(r.task for r in results):
    prefix = f'{task} {split} at '
    mine = [
      r for r in results if r.task == task and r.column.startswith(prefix)
    ]
    ranked = rank(split, mine, directory)
    texts.append(f'{task}, {split} split:\n\n{ranking(ranked)}')
    drawn[f'pareto_{task}'] = draw_pareto(ranked, f'{task}, {split} split')
  return '\n'.join(texts), {'parameters': draw_parameters([*names]), **drawn}


def ranking(ranked: Sequence[Ranked]) -> str:
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
    '| method | trained | seconds | learning rate | score | against the best |',
    '|---|---:|---:|---:|---:|---|',
  ]
  for one in ranked:
    score = f'{one.mean:.1f}'
    if len(one.scores) > 1:
      score += f' ± {one.deviation:.1f}'
    lines.append(
      f'| {one.name} | {one.trained:,} | {one.seconds:.0f} | {one.rate} |'
      f' {score} | {told(one)} |'
    )
  return '\n'.join([*lines, ''])


def draw_parameters(names: Sequence[str]) -> 'Figure':
  """Figure 4: what each method trains, in percent, by the size of T5 1.1."""
  from matplotlib import figure

  fig = figure.Figure(figsize=(6.5, 4), layout='constrained')
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
    xlabel='parameters of the model (T5 1.1 small to XXL)',
    ylabel='trained, % of them',
    title='What methods train, with their defaults',
  )
  _label(axes, ends)
  axes.grid(alpha=0.3)
  return fig


def _label(axes: Any, ends: Sequence[tuple[float, float, str]]) -> None:
  """Names lines at their ends, one above the other where these are close."""
  low, high = np.log10(axes.get_ylim())
  step, last = (high - low) / 22, -np.inf
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
  """Those that no method with as few parameters beats, by parameters."""
  front: list[Ranked] = []
  for one in sorted(ranked, key=lambda r: (r.trained, -r.mean)):
    if not front or one.mean > front[-1].mean:
      front.append(one)
  return front


def draw_pareto(ranked: Sequence[Ranked], title: str) -> 'Figure':
  """Score against trained parameters, and the line of `pareto`."""
  from matplotlib import figure

  fig = figure.Figure(figsize=(6.5, 4), layout='constrained')
  axes = fig.subplots()
  for one in ranked:
    axes.errorbar(
      one.trained, one.mean, one.deviation, fmt='o', capsize=3, color='C0'
    )
    axes.annotate(
      one.name,
      (one.trained, one.mean),
      (4, 4),
      textcoords='offset points',
      fontsize='small',
    )
  front = pareto(ranked)
  axes.step(
    [one.trained for one in front],
    [one.mean for one in front],
    where='post',
    color='C1',
    linewidth=1,
    label='best with as many parameters or fewer',
  )
  axes.set(
    xscale='log',
    xlabel='trained parameters',
    ylabel='score',
    title=f'{title}: methods, each at its best learning rate',
  )
  axes.margins(x=0.15)
  fig.legend(loc='outside lower center')
  axes.grid(alpha=0.3)
  return fig
