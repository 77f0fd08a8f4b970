"""`ptune study methods`: every method, on the same models and tasks.

A row of the first table is a method, a column its learning rate: that of its
file in gin/methods/ times one of a few factors, the same for all, so that every
method has a search of the same size. The second table takes each method's best
rate, by the mean over seeds, and ranks these: with the parameters that it
trains, the seconds that its training takes, and whether a paired t-test over
the seeds tells it from the best one. What it does not tell apart is a tie.

Scores are of the split on which the rate was chosen, and so a little high, for
all methods alike.

    parameters.png   figure 4 of Lester et al. 2021: what methods train, against
                     the size of the model
    pareto.png       the score against the parameters that are trained
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ptune import methods as methods_lib
from ptune.errors import UserError
from ptune.model.adapters import Method
from ptune.model.counts import counts
from ptune.model.sizes import SIZES
from ptune.studies.paper import Setting
from ptune.studies.study import Cell, Study
from ptune.studies.tables import Result
from ptune.training import optim

if TYPE_CHECKING:
  from matplotlib.figure import Figure

# A difference is none if it is as likely as this by chance.
SIGNIFICANCE = 0.05


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
  'superpos': (optim.adamw, 0.03),
  'ulpt': (optim.adamw, 0.03),
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
) -> Study:
  """Every method of RECIPES, each at as many learning rates.

  Args:
    setting: The models and tasks; the usual model is taken.
    names: Only these methods.
    factors: What the learning rate of each is multiplied by.

  Raises:
    ValueError: If a method is unknown, or there is none or no factor.
  """
  chosen = list(RECIPES) if names is None else list(names)
  unknown = sorted(set(chosen) - set(RECIPES))
  if unknown or not chosen or not factors:
    raise UserError(
      f'METHODS is {chosen} with FACTORS {list(factors)}; choose at least one'
      f' factor, and at least one of {list(RECIPES)}'
    )
  cells, rates = [], {}
  for name in chosen:
    optimizer, rate = RECIPES[name]
    method = method_of(name, setting)
    for factor in factors:
      column = f'x {factor:g}'
      rates[name, column] = rate * factor
      tuning = dataclasses.replace(
        setting.prompt, learning_rate=rate * factor, optimizer=optimizer
      )
      cells += [
        Cell(name, column, setting.usual, name, task, method, tuning)
        for task in setting.tasks
      ]
  return setting.study(
    'methods',
    'Methods, by factors of their learning rates',
    cells,
    timed=True,
    report=functools.partial(report, rates),
  )


@dataclasses.dataclass(frozen=True)
class Ranked:
  """A method at its best learning rate.

  Attributes:
    name: The method.
    rate: The learning rate.
    scores: The mean over tasks, of each seed.
    trained: Parameters.
    seconds: Of one training.
    differs: How likely its difference from the best is by chance; None if one
      seed says nothing about that, or for the best itself.
  """

  name: str
  rate: float
  scores: tuple[float, ...]
  trained: int
  seconds: float
  differs: float | None = None


def rank(
  rates: Mapping[tuple[str, str], float], results: Sequence[Result]
) -> list[Ranked]:
  """Each method at its best rate, the best first."""
  found: dict[str, list[Ranked]] = {}
  for (name, column), rate in rates.items():
    mine = [r for r in results if (r.row, r.column) == (name, column)]
    seeds = sorted({r.seed for r in mine})
    if mine:
      scores = tuple(
        float(np.mean([r.score for r in mine if r.seed == seed]))
        for seed in seeds
      )
      seconds = float(np.mean([r.seconds for r in mine]))
      one = Ranked(name, rate, scores, mine[0].trained, seconds)
      found.setdefault(name, []).append(one)
  mean = lambda one: float(np.mean(one.scores))
  best = [max(ones, key=mean) for ones in found.values()]
  first, *others = sorted(best, key=mean, reverse=True)
  return [
    first,
    *(
      dataclasses.replace(one, differs=_chance(first.scores, one.scores))
      for one in others
    ),
  ]


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
  rates: Mapping[tuple[str, str], float], results: Sequence[Result]
) -> tuple[str, dict[str, 'Figure']]:
  """The ranking, and two figures by name."""
  ranked = rank(rates, results)
  names = [one.name for one in ranked]
  return ranking(ranked), {
    'parameters': draw_parameters(names),
    'pareto': draw_pareto(ranked),
  }


def ranking(ranked: Sequence[Ranked]) -> str:
  """A table in Markdown."""

  def told(one: Ranked) -> str:
    if one is ranked[0]:
      return 'the best'
    if one.differs is None:
      return 'not tested: one seed'
    how = 'tie' if one.differs > SIGNIFICANCE else 'below'
    return f'{how} (p = {one.differs:.2g})'

  lines = [
    '| method | trained | seconds | learning rate | score | against the best |',
    '|---|---:|---:|---:|---:|---|',
  ]
  for one in ranked:
    score = f'{np.mean(one.scores):.1f}'
    if len(one.scores) > 1:
      score += f' ± {np.std(one.scores, ddof=1):.1f}'
    lines.append(
      f'| {one.name} | {one.trained:,} | {one.seconds:.0f} | {one.rate:g} |'
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
  for one in sorted(ranked, key=lambda r: (r.trained, -np.mean(r.scores))):
    if not front or np.mean(one.scores) > np.mean(front[-1].scores):
      front.append(one)
  return front


def draw_pareto(ranked: Sequence[Ranked]) -> 'Figure':
  """Score against trained parameters, and the line of `pareto`."""
  from matplotlib import figure

  fig = figure.Figure(figsize=(6.5, 4), layout='constrained')
  axes = fig.subplots()
  for one in ranked:
    mean = np.mean(one.scores)
    spread = np.std(one.scores, ddof=1) if len(one.scores) > 1 else 0
    axes.errorbar(one.trained, mean, spread, fmt='o', capsize=3, color='C0')
    axes.annotate(
      one.name,
      (one.trained, mean),
      (4, 4),
      textcoords='offset points',
      fontsize='small',
    )
  front = pareto(ranked)
  axes.step(
    [one.trained for one in front],
    [np.mean(one.scores) for one in front],
    where='post',
    color='C1',
    linewidth=1,
    label='best with as many parameters or fewer',
  )
  axes.set(
    xscale='log',
    xlabel='trained parameters',
    ylabel='score on the validation split',
    title='Score and parameters, each at its best learning rate',
  )
  axes.margins(x=0.15)
  fig.legend(loc='outside lower center')
  axes.grid(alpha=0.3)
  return fig
