"""The study of all methods: its recipes, its ranking, what it calls a tie."""

import dataclasses
import pathlib
import re

import numpy as np
import pytest

from ptune import methods
from ptune.methods import prompt_init
from ptune.studies import comparison, paper
from ptune.studies.study import Base, Tuning
from ptune.studies.tables import Result
from tests import tiny

GIN = pathlib.Path(__file__).parents[1] / 'gin' / 'methods'
QUICK = dataclasses.replace(
  paper.miniature(),
  bases={'base': Base(tiny.base(), tiny.CONFIG)},
  usual='base',
  tasks=('tiny',),
  task_feature_lengths=tiny.LENGTHS,
  prompt=Tuning(2, 0.3),
  prompt_length=5,
  init=prompt_init.random_uniform(),
  module='tests.tiny',
  batch_size=8,
)


def results(scores, trained):
  """Of methods by name: scores by factor, one a seed."""
  return [
    Result(name, column, 'tiny', seed, score, 1000, trained[name], '', '', 7.0)
    for name, columns in scores.items()
    for column, seeds in columns.items()
    for seed, score in enumerate(seeds)
  ]


SCORES = {
  'prompt': {'x 1': [80, 82, 81], 'x 3': [90, 91, 95]},
  'lora': {'x 1': [91, 90, 96], 'x 3': [10, 10, 10]},
  'ia3': {'x 1': [50, 51, 55], 'x 3': [49, 49, 49]},
}
TRAINED = {'prompt': 100, 'lora': 400, 'ia3': 200}
RATES = {
  (name, column): rate
  for name in SCORES
  for column, rate in (('x 1', 0.1), ('x 3', 0.3))
}


def test_recipes_are_those_of_the_gin_files():
  assert set(comparison.RECIPES) == set(methods.functions()) - {'multitask'}
  for name, (optimizer, rate) in comparison.RECIPES.items():
    if name == 'full':
      continue  # `Setting.model` has the rate of small models.
    text = (GIN / f'{name}.gin').read_text()
    assert f'LEARNING_RATE = {rate}\n' in text, name
    given = re.search(r'OPTIMIZER = @optim\.(\w+)', text)[1]
    if given == 'grouped':
      assert optimizer is comparison.offsets
      ratio = float(re.search(r'OFFSET_LEARNING_RATE = (.*)', text)[1]) / rate
      np.testing.assert_allclose(ratio, 1 / 300)
    else:
      assert optimizer.__name__ == given, name


def test_each_method_stands_at_its_best_rate_and_ties_are_told():
  ranked = comparison.rank(RATES, results(SCORES, TRAINED))
  assert [(r.name, r.rate) for r in ranked] == [
    ('lora', 0.1),
    ('prompt', 0.3),
    ('ia3', 0.1),
  ]
  # By hand: differences of 1, -1, 1 and of 41, 39, 41, with two degrees.
  t = (1 / 3) / (np.std([1, -1, 1], ddof=1) / np.sqrt(3))
  p = 1 - t / np.sqrt(t**2 + 2)
  np.testing.assert_allclose(ranked[1].differs, p)
  assert ranked[2].differs < 0.001
  lines = comparison.ranking(ranked).splitlines()
  assert lines[2].startswith('| lora | 400 | 7 | 0.1 | 92.3 ± 3.2 | the best')
  assert 'tie (p = ' in lines[3]
  assert 'below (p = ' in lines[4]


def test_one_seed_tells_nothing_apart():
  first = {
    name: {column: seeds[:1] for column, seeds in columns.items()}
    for name, columns in SCORES.items()
  }
  ranked = comparison.rank(RATES, results(first, TRAINED))
  assert [one.differs for one in ranked] == [None] * 3
  assert comparison.ranking(ranked).count('not tested: one seed') == 2


def test_the_front_has_what_nothing_smaller_beats():
  ranked = comparison.rank(RATES, results(SCORES, TRAINED))
  assert [r.name for r in comparison.pareto(ranked)] == ['prompt', 'lora']
  text, drawn = comparison.report(RATES, results(SCORES, TRAINED))
  assert text == comparison.ranking(ranked)
  lines = {text.get_text() for text in drawn['parameters'].axes[0].texts}
  assert lines == {'prompt', 'lora', 'ia3'}


def test_every_method_has_as_many_rates():
  study = comparison.methods(QUICK, factors=(0.5, 2))
  assert len(study.cells) == 2 * len(comparison.RECIPES)
  ia3 = [c.tuning.learning_rate for c in study.cells if c.row == 'ia3']
  np.testing.assert_allclose(ia3, [0.0015, 0.006])
  with pytest.raises(ValueError, match=r"METHODS is \['lorra'\]"):
    comparison.methods(QUICK, ['lorra'])
