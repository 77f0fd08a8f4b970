"""A study trains each cell once per seed, resumes, and reports its results."""

import copy
import dataclasses
import os
import pathlib
from unittest import mock

import numpy as np
import pytest
import seqio
from etils import epath

import gin
from ptune import cli
from ptune.config import gin_files
from ptune.methods import full, prompt, prompt_init
from ptune.studies import paper as studies
from ptune.studies import study, tables
from ptune.studies.study import Base, Cell, Study, Tuning
from ptune.studies.tables import Result
from ptune.training import optim
from tests import readme_test, tiny

QUICK = Tuning(2, 0.1)
SEEDS = 2


@pytest.fixture(autouse=True)
def forget_bindings():
  yield
  gin.clear_config()


def a_study(**changes) -> Study:
  """Two prompt lengths and full tuning; one prompt has a second test task."""

  def cell(row, training, method, **how):
    return Cell(row, 'base', 'base', training, 'tiny', method, QUICK, **how)

  cells = (
    cell('short', 'short', prompt.prompt(2)),
    cell('long', 'long', prompt.prompt(3)),
    cell('long, elsewhere', 'long', prompt.prompt(3), evaluated='tiny_b'),
    cell('model', 'model', full.full()),
  )
  return Study(
    **{
      'name': 'lengths',
      'title': 'Lengths',
      'bases': {'base': Base(tiny.base(), tiny.CONFIG)},
      'cells': cells,
      'task_feature_lengths': tiny.LENGTHS,
      'module': 'tests.tiny',
      'batch_size': 8,
      **changes,
    }
  )


def run(directory, one):
  with tiny.one_device():
    study.study(
      model_dir=os.fspath(directory), studies=[one], seeds=SEEDS, eval_steps=1
    )
  file = directory / one.name / 'results.csv'
  return tables.read(file.read_text()) if file.exists() else []


@pytest.mark.slow
def test_a_study_trains_every_cell_and_goes_on_where_it_was(tmp_path):
  one, file = a_study(), tmp_path / 'lengths' / 'results.csv'

  # A training that was stopped in the middle gets no score.
  def half(*args, **settings):
    return train_many(*args, **{**settings, 'train_steps': 1})

  train_many = study.train_many
  with mock.patch.object(study, 'train_many', half):
    run(tmp_path, one)
  assert not file.exists()
  # Stopped before the last training, and before any score was written.
  with (
    mock.patch.object(study, 'train', side_effect=KeyboardInterrupt),
    pytest.raises(KeyboardInterrupt),
  ):
    run(tmp_path, one)
  prompts = tables.read(file.read_text())
  assert {r.row for r in prompts} == {'short', 'long', 'long, elsewhere'}
  file.unlink()
  results = run(tmp_path, one)
  assert set(results) > set(prompts)
  assert len(results) == len(one.cells) * SEEDS
  by_row = {(r.row, r.seed): r for r in results}
  assert len(by_row) == len(results)
  assert by_row['short', 0].trained == 2 * tiny.CONFIG.emb_dim
  assert by_row['model', 0].trained == by_row['model', 0].parameters
  # One training is evaluated on two tasks.
  assert by_row['long', 1].prompt == by_row['long, elsewhere', 1].prompt
  files = {p.name for p in file.parent.iterdir()}
  assert files >= {'results.csv', 'table.md', 'figure.png', 'figure.svg'}
  with (
    mock.patch.object(study, 'train_many', side_effect=AssertionError),
    mock.patch.object(study, 'train', side_effect=AssertionError),
  ):
    assert run(tmp_path, one) == results  # All exists.
  # With another batch size, all is trained again, and only that is shown.
  other = run(tmp_path, a_study(batch_size=16, cells=one.cells[:1]))
  assert other[: len(results)] == results
  assert [r.row for r in other[len(results) :]] == ['short'] * SEEDS
  assert other[-1].prompt != by_row['short', 1].prompt
  table = (file.parent / 'table.md').read_text()
  assert 'short' in table and 'long' not in table


@pytest.mark.slow
def test_an_ensemble_stands_beside_the_average_and_the_best(tmp_path):
  cell = a_study().cells[0]
  cell = dataclasses.replace(cell, column='average')
  one = a_study(cells=(cell,), seeds=3, vote=True)
  results = run(tmp_path / 'a,b', one)
  scores = {(r.column, r.seed): r.score for r in results}
  assert set(scores) == {
    *(('average', seed) for seed in range(3)),
    ('best', -1),
    ('ensemble', -1),
  }
  members = [scores['average', seed] for seed in range(3)]
  assert scores['best', -1] == max(members)
  assert run(tmp_path / 'a,b', one) == results
  # With one more member, the ensemble votes again.
  more = run(tmp_path / 'a,b', dataclasses.replace(one, seeds=4))
  votes = [r for r in more if r.column == 'ensemble']
  assert len(more) == len(results) + 3 and len(votes) == 2
  assert votes[0].setting != votes[1].setting


OTHER_SETTINGS = [
  {'bases': {'base': Base('/another', tiny.CONFIG)}},
  {'batch_size': 16},
  {'task_feature_lengths': {'inputs': 8, 'targets': 4}},
  {'method': prompt.prompt(4)},
  {'method': prompt.prompt(2, prompt_init.from_sampled_vocab())},
  {'method': prompt.prompt(2, prompt_init.from_sampled_vocab(10))},
  {'tuning': Tuning(2, 0.2)},
  {'tuning': Tuning(2, 0.1, optimizer=optim.relative_adam)},
  {'task': 'another'},
  {'evaluated': 'tiny_b'},
  {'split': 'test'},
  {'best_metric': 'loss'},
  {'eval_steps': 2},
  {'dtype': 'bfloat16'},
]


@pytest.mark.parametrize(
  'changes',
  OTHER_SETTINGS,
  ids=lambda changes: next(iter(changes)),
)
def test_a_score_of_other_settings_is_not_taken_for_it(tmp_path, changes):
  def setting(changes):
    cell = a_study().cells[0]
    of_cell = {k: v for k, v in changes.items() if hasattr(cell, k)}
    of_study = {k: v for k, v in changes.items() if hasattr(a_study(), k)}
    how = {'eval_steps': 1, 'best_metric': None, 'model_parallel': 1}
    how |= {k: v for k, v in changes.items() if k in how}
    runner = study.Runner(
      a_study(**of_study),
      epath.Path(tmp_path),
      SEEDS,
      8,
      {'dtype': changes.get('dtype', 'float32')},
      **how,
    )
    return runner._setting(dataclasses.replace(cell, **of_cell))

  assert setting({}) == setting({})
  assert setting(changes) != setting({})


def result(row, column, seed, score, task='a', parameters=1):
  return Result(row, column, task, seed, score, parameters, 1, 'p')


def test_a_table_has_mean_and_standard_deviation_over_seeds():
  results = [
    result('prompt, long', 'small', 0, 50.0),
    result('prompt, long', 'small', 1, 54.0),
    result('prompt, long', 'large', 0, 90.0, task='a'),
    result('prompt, long', 'large', 0, 80.0, task='b'),
    result('model', 'small', -1, 61.25),
  ]
  assert tables.read(tables.dump(results)) == results
  grid = tables.table(results)
  assert grid['prompt, long'] == {'small': [50.0, 54.0], 'large': [85.0]}
  assert tables.markdown(grid).splitlines()[2:] == [
    '| prompt, long | 52.0 ± 2.8 | 85.0 |',
    '| model | 61.2 | - |',
  ]


def test_a_figure_has_a_line_for_each_row_against_the_parameters():
  grid = {
    'prompt': {'small': [50.0, 54.0], 'large': [85.0]},
    'model': {'small': [60.0]},
  }
  [axes] = tables.draw(grid, 'Title', {'small': 10, 'large': 100}).axes
  lines = {c.get_label(): c.lines[0].get_xydata() for c in axes.containers}
  np.testing.assert_allclose(lines['prompt'], [[10, 52], [100, 85]])
  np.testing.assert_allclose(lines['model'], [[10, 60]])
  assert axes.get_xscale() == 'log'
  [axes] = tables.draw(grid, 'Title', None).axes
  names = [text.get_text() for text in axes.get_xticklabels()]
  assert names == ['prompt', 'model']


ROOT = pathlib.Path(__file__).parents[1]
ALL = {
  name.removeprefix('studies/').removesuffix('.gin')
  for name in gin_files.own_files(['studies'])
}


@pytest.mark.parametrize('setting', studies.SETTINGS)
@pytest.mark.parametrize('name', sorted(ALL))
def test_every_file_makes_a_study_of_known_models_and_tasks(name, setting):
  files = [f'studies/{name}.gin']
  bindings = ["MODEL_DIR='m'", f'SETTING={setting!r}']
  gin_files.parse(files, bindings, (), study.study)
  made = gin.query_parameter('study.study.studies')
  made = copy.deepcopy(made)
  assert made
  for one in made:
    assert len(one.cells) > 1 or one.seeds
    assert {cell.base for cell in one.cells} <= set(one.bases)
    seeds = [(c.row, c.column, c.task) for c in one.cells]
    assert len(set(seeds)) == len(seeds), 'a place in the table is one score'
    __import__(one.module)
    for cell in one.cells:
      for task in filter(None, (cell.task, cell.evaluated)):
        assert seqio.get_mixture_or_task(task).name == task


def test_settings_are_looked_up_and_changed():
  own = Base('/models/mine')
  changed = studies.setting('miniature', base=own, tasks=('tiny',))
  assert changed.bases['yours'] == own
  assert studies.prompt_length(changed).cells[0].base == 'yours'
  with pytest.raises(ValueError, match=r'miniature.*paper'):
    studies.setting('small')
  with pytest.raises(ValueError, match=r'no models .*xxl.*nano'):
    studies.setting('miniature', usual='xxl')


def test_a_study_of_ones_own_task_is_a_short_file(tmp_path):
  file = tmp_path / 'mine.gin'
  file.write_text(readme_test.files('docs/studies.md')['my_sweep.gin'])
  gin_files.parse([str(file)], ["MODEL_DIR='m'"], (), study.study)
  [one] = copy.deepcopy(gin.query_parameter('study.study.studies'))
  assert one.bases['yours'].checkpoint == '/models/mine'
  assert {(c.task, c.base) for c in one.cells} == {('my_sst2', 'yours')}
  assert len(one.cells) == 6


def test_an_unknown_study_is_refused(capsys):
  assert cli.main(['study', 'prompt_lenght', "--gin.MODEL_DIR='m'"]) == 2
  assert 'studies/prompt_length.gin' in capsys.readouterr().err


def test_a_tuning_has_the_schedule_of_its_decay():
  rate = Tuning(10, 0.5, 'linear', optim.adafactor).schedule()
  assert float(rate(0)) == 0.5 and float(rate(10)) == 0.0


@pytest.mark.parametrize('name', ['short', 'a_task_of_a_long_name -> another'])
def test_a_figure_shows_every_score_and_room_is_made_for_names(name):
  grid = {f'{name} {i}': {'a': [1.0, 3.0], 'b': [float(i)]} for i in range(3)}
  fig = tables.draw(grid, 'title', None)
  fig.draw_without_rendering()
  (axes,) = fig.axes
  marks = {
    box.get_label(): np.array(box.lines[0].get_xydata())
    for box in axes.containers
  }
  flat = name != 'short'
  assert np.allclose(marks['a'][:, 0 if flat else 1], 2)
  assert np.allclose(marks['b'][:, 0 if flat else 1], range(3))
  for label in axes.get_yticklabels() if flat else axes.get_xticklabels():
    box = label.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= fig.bbox.x1, label
