"""`ptune study methods`: compares every method, on the same model and tasks.

The study has two parts, which it does for each task:

1. The search. It trains every method with one seed at the same number of
   learning rates: the rate of the method's file in gin/methods/, multiplied by
   each of the same few factors. It chooses the rate with the best score on the
   validation split.
2. The comparison. It trains every method at its chosen rate with new seeds, and
   scores it on the test split. The validation split also chooses the step of
   each run; the test split chooses nothing.

A table for each task ranks the methods. It also shows the number of parameters
that each trains, the seconds of a training and the learning rate. Two paired
t-tests compare each method with the best one: over the seeds, and over the rows
of the test split, where a row counts how many of the seeds got it right. A
method is below the best only if both tests say so. Otherwise the two are tied.

    parameters.png     figure 4 of Lester et al. 2021: the share of parameters
                       that methods train, by the size of the model
    pareto_TASK.png    the score against the number of trained parameters
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from ptune import methods as methods_lib
from ptune.errors import UserError, check_counts
from ptune.model.adapters import Method
from ptune.studies import ranking, tables
from ptune.studies.paper import Setting
from ptune.studies.study import Cell, Study
from ptune.studies.tables import Result
from ptune.tasks.texts import TextTask
from ptune.training import optim

if TYPE_CHECKING:
  from matplotlib.figure import Figure

# The seed of the search; the comparison uses others.
SEARCH_SEED = 1000
# Follows a rate that is the lowest or highest of the search.
EDGE = ' (edge)'


def offsets(
  initial_step: int = 0, learning_rate: Any = 0.3, ratio: float = 1 / 300
):
  """AdamW, with a learning rate of its own for vectors added to the inputs.

  `ratio` is the one in the files of gin/methods/.
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
  """A method with its defaults, and prompts of the setting's length.

  DePT and ADePT get prompts of 2/5 of that length, and SMoP gets four of 1/4.
  The ratio to a plain prompt's rows is then about that of their papers.
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
  """Compares the methods of RECIPES, each at its best learning rate.

  Args:
    setting: The models and tasks; the study uses the usual model.
    names: The methods to compare.
    factors: The search multiplies each method's usual learning rate by these.
    steps: The steps of each training; None for those of the setting's prompts.
    evaluations: How often each training is evaluated, at even distances.

  Raises:
    ValueError: If a method is unknown, if there is no method or no factor, or
      if a task of files has no test split.
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
    'Methods, each at the best learning rate of the search: its usual rate'
    ' times one of some factors',
    search,
    evaluations=evaluations,
    timed=True,
    then=functools.partial(_at_best, setting, search),
    report=functools.partial(report, setting.test),
  )


def _cell(
  setting: Setting, name: str, task: str | TextTask, factor: float
) -> Cell:
  """A method in the search, at one of its learning rates."""
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
  """The comparison: each method on each task at the best rate of the search.

  If rates score the same, the one nearest to the gin file's is chosen.
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


def report(
  split: str, results: Sequence[Result], directory: epath.Path
) -> tuple[str, dict[str, 'Figure']]:
  """The search and the ranking on each task as text, and figures by name."""
  texts, drawn, names = [], {}, dict.fromkeys(r.row for r in results)
  for task in dict.fromkeys(r.task for r in results):
    searched, scored = f'{task} x ', f'{task} {split} at '
    mine = [r for r in results if r.task == task]
    of_search = [
      dataclasses.replace(r, column=f'x {r.column.removeprefix(searched)}')
      for r in mine
      if r.column.startswith(searched)
    ]
    if of_search:
      grid = tables.markdown(tables.table(of_search))
      texts.append(f'{task}, the search (validation split):\n\n{grid}')
    ranked = ranking.rank(
      split, [r for r in mine if r.column.startswith(scored)], directory
    )
    texts.append(f'{task}, {split} split:\n\n{ranking.table(ranked)}')
    drawn[f'pareto_{task}'] = ranking.draw_pareto(
      ranked, f'{task}, {split} split'
    )
  figures = {'parameters': ranking.draw_parameters([*names]), **drawn}
  return '\n'.join(texts), figures
