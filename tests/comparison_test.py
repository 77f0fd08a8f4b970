"""The study of all methods: its recipes, rankings and ties."""

import dataclasses
import json
import pathlib
import re
from unittest import mock

import numpy as np
import pytest
from etils import epath
from scipy import stats

from ptune import methods
from ptune.convert.pieces import Bytes
from ptune.methods import prompt_init
from ptune.studies import comparison, paper, ranking, study, tables
from ptune.studies.study import Base, Tuning
from ptune.studies.tables import Result
from ptune.tasks import files
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


SCORES = {
  'prompt': [90, 91, 95],
  'lora': [91, 90, 96],
  'ia3': [50, 51, 55],
}
TRAINED = {'prompt': 100, 'lora': 400, 'ia3': 200}


def results(task='tiny', count=3):
  """Returns scores of the test split in the study's format, one per seed."""
  return [
    Result(
      name,
      f'{task} test at 0.1',
      task,
      seed,
      score,
      1000,
      TRAINED[name],
      f'runs/{name}_seed{seed}',
      seconds=7.0,
    )
    for name, scores in SCORES.items()
    for seed, score in enumerate(scores[:count])
  ]


def write_predictions(directory, rows):
  """Writes which rows each run got right, in the format of an evaluation."""
  for name, seeds in rows.items():
    for seed, right in enumerate(seeds):
      place = directory / 'runs' / 'eval_test' / name / 'tiny'
      place.mkdir(parents=True, exist_ok=True)
      lines = [json.dumps({'right': bool(x)}) for x in right]
      (place / f'predictions-{seed}.jsonl').write_text('\n'.join(lines))


def test_recipes_are_those_of_the_gin_files():
  assert set(comparison.RECIPES) == set(methods.functions()) - {'multitask'}
  for name, (optimizer, rate) in comparison.RECIPES.items():
    if name == 'full':
      continue  # `Setting.model` has a rate for small models.
    text = (GIN / f'{name}.gin').read_text()
    assert f'LEARNING_RATE = {rate}\n' in text, name
    given = re.search(r'OPTIMIZER = @optim\.(\w+)', text)[1]
    if given == 'grouped':
      assert optimizer is comparison.offsets
      ratio = float(re.search(r'OFFSET_LEARNING_RATE = (.*)', text)[1]) / rate
      np.testing.assert_allclose(ratio, 1 / 300)
    else:
      assert optimizer.__name__ == given, name


def test_methods_are_ranked_and_ties_are_told(tmp_path):
  ranked = ranking.rank('test', results(), tmp_path)
  assert [r.name for r in ranked] == ['lora', 'prompt', 'ia3']
  # Computed by hand: the differences are 1, -1, 1 and 41, 39, 41, with two
  # degrees of freedom.
  t = (1 / 3) / (np.std([1, -1, 1], ddof=1) / np.sqrt(3))
  p = 1 - t / np.sqrt(t**2 + 2)
  np.testing.assert_allclose(ranked[1].over_seeds, p)
  assert ranked[2].over_seeds < 0.001
  assert [one.over_rows for one in ranked] == [None] * 3
  lines = ranking.table(ranked).splitlines()
  assert lines[2].startswith(
    '| lora | 400 | 7 | 0.1 | 92.3 ± 3.2 | 91.0, 90.0, 96.0 | the best'
  )
  assert 'tie (p: seeds ' in lines[3]
  assert 'below (p: seeds ' in lines[4]


def test_a_method_is_below_only_if_seeds_and_rows_say_so(tmp_path):
  best = np.tile([[1], [1], [0]], 20).T.ravel() > 0
  worse = best.copy()
  worse[0] = False
  write_predictions(
    tmp_path,
    {'lora': [best] * 3, 'prompt': [best, ~best, best], 'ia3': [worse] * 3},
  )
  shares = ranking.right('test', results()[:3], epath.Path(tmp_path))
  np.testing.assert_allclose(shares, np.where(best, 2 / 3, 1 / 3))
  lora, prompt, ia3 = ranking.rank('test', results(), epath.Path(tmp_path))
  # One of sixty rows differs, so t is 1 whatever the seeds show.
  want = stats.ttest_1samp([1.0] + [0.0] * 59, 0).pvalue
  np.testing.assert_allclose(ia3.over_rows, want)
  assert ia3.over_seeds < 0.001 and not ia3.below
  assert prompt.over_rows < 0.05 < prompt.over_seeds and not prompt.below
  assert lora.over_rows is None
  assert ', rows 0.32)' in ranking.table([lora, ia3])


def test_one_seed_tells_nothing_apart(tmp_path):
  ranked = ranking.rank('test', results(count=1), tmp_path)
  assert [one.over_seeds for one in ranked] == [None] * 3
  assert ranking.table(ranked).count('not tested: one seed') == 2


def test_the_front_has_what_nothing_smaller_beats(tmp_path):
  both = [*results(), *results('another')]
  ranked = ranking.rank('test', results(), tmp_path)
  assert [r.name for r in ranking.pareto(ranked)] == ['prompt', 'lora']
  text, drawn = comparison.report('test', both, epath.Path(tmp_path))
  assert text.count(ranking.table(ranked)) == 2
  assert set(drawn) == {'parameters', 'pareto_tiny', 'pareto_another'}
  lines = {text.get_text() for text in drawn['parameters'].axes[0].texts}
  assert lines == {'prompt', 'lora', 'ia3'}
  names = drawn['pareto_tiny'].axes[0].texts
  assert {text.get_text() for text in names} == {'prompt', 'lora', 'ia3'}


def test_names_of_points_that_lie_together_stay_apart():
  ranked = [
    ranking.Ranked(name, '1', (90.0, 91.0), 100 + i, 1.0)
    for i, name in enumerate(('prompt', 'superpos', 'decoder_prompt'))
  ]
  far = ranking.Ranked('full', '1', (95.0, 96.0), 10**6, 1.0)
  _, *texts = ranking.draw_pareto([far, *ranked], 'here').axes[0].texts
  heights = sorted(text.xyann[1] for text in texts)
  assert min(np.diff(heights)) >= 10


def test_every_method_has_as_many_rates():
  one = comparison.methods(QUICK, factors=(0.5, 2))
  assert len(one.cells) == 2 * len(comparison.RECIPES)
  ia3 = [c.tuning.learning_rate for c in one.cells if c.row == 'ia3']
  np.testing.assert_allclose(ia3, [0.0015, 0.006])
  assert one.evaluations == 4
  assert comparison.methods(QUICK, evaluations=2).evaluations == 2
  with pytest.raises(ValueError, match='evaluations is 0'):
    comparison.methods(QUICK, evaluations=0)
  with pytest.raises(ValueError, match=r"METHODS is \['lorra'\]"):
    comparison.methods(QUICK, ['lorra'])
  task = files.from_rows({'train': [], 'validation': []}, vocabulary=Bytes())
  without = dataclasses.replace(QUICK, tasks=(task,))
  with pytest.raises(ValueError, match=r"'from_rows' has .*'validation'"):
    comparison.methods(without)


def test_the_rate_of_the_search_is_that_of_the_comparison():
  one = comparison.methods(QUICK, ['ia3'], factors=(0.3, 1, 3))
  searched = [
    Result(c.row, c.column, 'tiny', 1000, score, 1, 1, '')
    for c, score in zip(one.cells, [80, 90, 90], strict=True)
  ]
  [cell] = one.then(searched)
  # If two scores are equal, the gin file's rate wins.
  assert cell.tuning == one.cells[1].tuning
  assert (cell.column, cell.split) == ('tiny test at 0.003', 'test')
  assert cell.seeds is None
  searched[2] = dataclasses.replace(searched[2], score=91)
  [cell] = one.then(searched)
  assert cell.column == 'tiny test at 0.009 (edge)'


@pytest.mark.slow
def test_the_comparison_has_new_seeds_on_the_test_split(tmp_path):
  rows = {split: tiny.rows(split) for split in tiny.SIZES}
  task = files.from_rows(
    rows, label_names=tiny.LABELS, name='rows', vocabulary=Bytes()
  )
  setting = dataclasses.replace(QUICK, tasks=('tiny', task))

  def run():
    one = comparison.methods(setting, ['prompt'], (0.5, 2))
    with tiny.one_device():
      study.study(model_dir=str(tmp_path), studies=[one], seeds=2)
    return tables.read((tmp_path / 'methods' / 'results.csv').read_text())

  # Stopping after the search keeps the search's scores.
  with (
    mock.patch.object(comparison, '_at_best', side_effect=KeyboardInterrupt),
    pytest.raises(KeyboardInterrupt),
  ):
    run()
  searched = tables.read((tmp_path / 'methods' / 'results.csv').read_text())
  assert len(searched) == 4 and {r.seed for r in searched} == {1000}
  found = run()
  assert found[:4] == searched
  # Two learning rates of a task share a program.
  assert len({r.prompt.split('/')[1] for r in searched}) == 2
  assert len(found[4:]) == 4 and {r.seed for r in found[4:]} == {0, 1}
  for r in found[4:]:
    run_of = tmp_path / 'methods' / r.prompt
    name = run_of.name.removesuffix(f'_seed{r.seed}')
    place = run_of.parent / 'eval_test' / name / r.task
    file = place / f'predictions-{r.seed}.jsonl'
    right = [json.loads(x)['right'] for x in file.read_text().splitlines()]
    assert len(right) == tiny.SIZES['test']
    if r.task == 'rows':
      np.testing.assert_allclose(r.score, 100 * np.mean(right), atol=1e-4)
  text = (tmp_path / 'methods' / 'table.md').read_text()
  assert 'rows, the search (validation split):\n\n| | x 0.5 | x 2 |' in text
  assert 'rows, test split:' in text and '| the best |' in text
  with mock.patch.object(study.Runner, '_train', side_effect=AssertionError):
    assert run() == found
