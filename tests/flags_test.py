"""Short flags: their meaning, and a run's directory instead of flags."""

import argparse
import io
import json
import os
import re
import sys

import pytest

import gin
from ptune import cli
from ptune.config import flags, gin_files
from ptune.errors import UserError
from ptune.serving import serve
from tests import tiny

ROWS = {
  'train': [('so good', 'yes'), ('so bad', 'no')] * 4,
  'validation': [('good', 'yes'), ('bad', 'no')],
}


@pytest.fixture(autouse=True)
def no_gin_from_elsewhere():
  gin.clear_config()
  yield
  gin.clear_config()


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """Writes the rows as CSV files; returns their paths by split."""
  directory = tmp_path_factory.mktemp('rows')
  paths = {}
  for split, rows in ROWS.items():
    paths[split] = str(directory / f'{split}.csv')
    with open(paths[split], 'w') as f:
      f.writelines(f'{text},{label}\n' for text, label in [('t', 'l'), *rows])
  return paths


def short(files, **more):
  """Returns the flags of a training on the rows."""
  rows = {**files, 'inputs': '{t}', 'targets': '{l}', 'labels': ['no', 'yes']}
  small = {'steps': 2, 'prompt_length': 3, 'batch_size': 8}
  return {'base': 'ptune://tiny', **rows, **small, **more}


def config(names, bindings):
  """Returns the configuration that gin files and bindings produce."""
  gin.clear_config()
  gin_files.parse(names, bindings)
  return gin.config_str()


def test_short_settings_are_the_long_command_line(files):
  expected = config(
    [
      *('models/from_checkpoint.gin', 'prompts/from_class_labels.gin'),
      *('tasks/from_files.gin', 'runs/train.gin'),
    ],
    [
      *("INITIAL_CHECKPOINT_PATH='ptune://tiny'", 'TRAIN_STEPS=2'),
      *('PROMPT_LENGTH=3', 'BATCH_SIZE=8', "MODEL_DIR='r'"),
      *("INPUTS='{t}'", "TARGETS='{l}'", "LABEL_NAMES=['no', 'yes']"),
      *('EVAL_PERIOD=100', 'VOCABULARY=%INITIAL_CHECKPOINT_PATH'),
      "TASK_FEATURE_LENGTHS={'inputs': 256, 'targets': 32}",
      f'TASK_FILES={files!r}',
    ],
  )
  assert config(*flags.expand('train', short(files, model_dir='r'))) == expected


def test_flags_mix_with_gin_files(files, tmp_path):
  mine = tmp_path / 'mine.gin'
  mine.write_text("MODEL_DIR = 'mine'\nBATCH_SIZE = 4\n")
  given = [str(mine), 'methods/lora.gin']
  found = config(*flags.expand('train', short(files), given))
  assert "MODEL_DIR = 'mine'" in found and 'METHOD = @lora.lora()' in found
  assert 'BATCH_SIZE = 8' in found  # A flag overrides a file.
  assert flags.expand('train', {}, given) == (given, [])


def test_rows_may_be_those_of_a_seqio_task():
  names, bindings = flags.expand('train', {'base': 'b', 'train': 'my_task'})
  assert "MIXTURE_OR_TASK_NAME = 'my_task'" in bindings
  assert names == ['runs/tune.gin', 'prompts/sampled_vocab.gin']
  own = {'base': 'b', 'train': 'my_task', 'loss': 'private'}
  names, _ = flags.expand('train', own)
  assert 'losses/private.gin' in names


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'train': 'a.csv', 'test': 'b.txt'}, "--test is 'b.txt'; expected a file"),
    (
      {'train': 'a.txt', 'inputs': '{t}', 'targets': '{l}'},
      "--train is 'a.txt', which .* A task has its own inputs, targets; leave",
    ),
    ({'method': 'lor'}, "there is no method 'lor'; did you mean lora"),
    ({'model': 't5_1_1_bas'}, 'did you mean t5_1_1_base'),
    ({'loss': 'privat'}, "there is no loss 'privat'; did you mean private"),
    ({'split': 'test'}, '--split is only a flag of ablate, eval, infer'),
    ({'steps': 5, 'train_steps': 6}, 'steps and train_steps exclude each'),
    ({'base': 'b', 'initial_checkpoint_path': 'c'}, 'exclude each other'),
    ({'train': 'a.csv', 'task_files': {}}, 'train and task_files exclude'),
    ({'train': 'a.csv', 'mixture_or_task_name': 'x'}, 'exclude each other'),
  ],
)
def test_a_wrong_setting_is_named(given, message):
  with pytest.raises(UserError, match=message):
    flags.expand('train', given)


@pytest.mark.parametrize(
  ('flag', 'text', 'value'),
  [
    ('steps', '5', 5),
    ('model_dir', 'runs/5', 'runs/5'),
    ('eval_split', 'None', None),
    ('labels', 'no,yes', ['no', 'yes']),
    ('labels', "['no', 'yes']", ['no', 'yes']),
    ('labels', '0,1', ['0', '1']),
    ('labels', 'True, False', ['True', 'False']),
    ('labels', "{'0': 'no', '1': 'yes'}", {'0': 'no', '1': 'yes'}),
    ('factors', '0.3,1.0', (0.3, 1.0)),
    ('task_feature_lengths', "{'inputs': 8}", {'inputs': 8}),
  ],
)
def test_a_value_is_written_as_in_python_a_text_without_quotes(
  flag, text, value
):
  assert flags.value_of(flag, text) == value


def test_a_value_of_another_type_is_refused():
  with pytest.raises(UserError, match='expected a value such as 30000'):
    flags.value_of('steps', 'many')


@pytest.mark.parametrize('program', [*flags.TRAINING, *flags.ASKING])
def test_help_explains_what_the_program_reads(program, capsys):
  explained = flags.explained(program)
  assert next(iter(explained)) == 'most used'
  assert explained['most used']['labels'].endswith(', such as no,yes')
  with pytest.raises(SystemExit):
    cli.main([program, '--help'])
  told = capsys.readouterr().out
  for group in explained.values():
    assert all(f'\n  --{flag} ' in told for flag in group)
  if program not in ('plan', 'doctor'):
    # The help has a group for each macro in the program's files.
    text = flags._with_includes(f'runs/{program}.gin')
    flags_told = {flag for group in explained.values() for flag in group}
    macros = {flags.names().get(flag) for flag in flags_told}
    assert {*re.findall(r'^([A-Z_]+) =', text, re.MULTILINE)} <= macros


def test_the_directory_of_a_run_is_enough(files, tmp_path, monkeypatch, capsys):
  def ptune(*arguments):
    gin.clear_config()
    with tiny.one_device():
      assert cli.main(list(arguments)) == 0, capsys.readouterr().err
    return capsys.readouterr().out

  monkeypatch.chdir(tmp_path)
  given = short(files, model_dir='run') | {'labels': 'no,yes'}
  ptune('train', *(f'--{name}={value}' for name, value in given.items()))
  trained = [r for r in tiny.records('run') if 'task' in r]
  (tmp_path / 'elsewhere').mkdir()
  monkeypatch.chdir('elsewhere')
  ptune('eval', '../run')
  assert tiny.records('../run/eval_validation') == trained
  (tmp_path / 'texts.txt').write_text('good\nbad\n')
  ptune('infer', '../run', '../texts.txt')
  lines = (tmp_path / 'run/infer/texts-predict.jsonl').read_text().splitlines()
  assert [json.loads(line)['inputs'] for line in lines] == ['good', 'bad']
  asked = io.TextIOWrapper(io.BytesIO(b'good\nbad\n'))
  monkeypatch.setattr(sys, 'stdin', asked)
  answers = [json.loads(line)['prediction'] for line in lines]
  assert ptune('infer', '../run', '-').splitlines() == answers
  assert 'initial_checkpoint_path  ptune://tiny' in ptune('inspect', '../run')
  ptune('export', '../run')
  assert os.path.isfile('../run/export/peft/adapter_config.json')
  served = argparse.ArgumentParser()
  serve.add_arguments('serve', served)
  args = served.parse_args(['../run', '--output_length=5'])
  serve.take_from_runs(args)
  assert (args.base, args.prompts) == ('ptune://tiny', '../run')
  assert (args.input_length, args.output_length) == (256, 5)


def test_rows_of_another_file_are_asked_of_a_run(files, tmp_path):
  (tmp_path / 'config.gin').touch()
  record = {'initial_checkpoint_path': 'b'}
  (tmp_path / 'run.json').write_text(json.dumps(record))
  run = str(tmp_path)
  given = {'test': files['train'], 'base': 'c'}
  names, bindings = flags.expand('eval', given, run=run)
  assert names == [f'{run}/config.gin', 'runs/eval.gin']
  assert f'TASK_FILES = {{{"test"!r}: {files["train"]!r}}}' in bindings
  assert "EVAL_SPLIT = 'test'" in bindings
  assert "CHECKPOINT_PATH = 'c'" in bindings


def test_a_run_keeps_its_own_method(tmp_path):
  with pytest.raises(UserError, match='has its own method and model; leave'):
    flags.expand('eval', {'method': 'lora', 'model': 'x'}, run=str(tmp_path))
  (tmp_path / 'config.gin').write_text("LABEL_NAMES = ['no', 'yes']\n")
  (tmp_path / 'run.json').write_text('{"initial_checkpoint_path": "b"}')
  with pytest.raises(UserError, match=r"trained with \['no', 'yes'\]: the num"):
    flags.expand('eval', {'labels': ['yes', 'no']}, run=str(tmp_path))
  more = {'labels': ['no', 'yes', 'maybe']}
  _, bindings = flags.expand('eval', more, run=str(tmp_path))
  assert "LABEL_NAMES = ['no', 'yes', 'maybe']" in bindings


@pytest.mark.parametrize('record', [None, '{', '[1]', '{}'])
def test_a_run_without_its_record_is_said(record, tmp_path):
  (tmp_path / 'config.gin').touch()
  if record is not None:
    (tmp_path / 'run.json').write_text(record)
  with pytest.raises(UserError, match=r'run.json is missing or damaged'):
    flags.expand('eval', {}, run=str(tmp_path))


def test_a_moved_run_finds_the_rows_that_it_kept(tmp_path):
  (tmp_path / 'rows').mkdir()
  for name in ('config.gin', 'rows/train.jsonl'):
    (tmp_path / name).touch()
  config = str(tmp_path / 'config.gin')
  names, bindings = flags.expand('train', {}, [config])
  assert names == [config]
  kept = {'train': str(tmp_path / 'rows/train.jsonl')}
  assert bindings == [f'TASK_FILES = {kept!r}']
  assert flags.expand('train', {}, ['mine.gin']) == (['mine.gin'], [])


def test_a_moved_run_never_names_the_directory_where_it_was(tmp_path):
  config = tmp_path / 'config.gin'
  config.write_text("MODEL_DIR = 'the/directory/of/another/run'\n")
  mine = f'MODEL_DIR = {str(tmp_path)!r}'
  # Without run.json it is a copy of the settings, for a run elsewhere.
  assert flags.expand('train', {}, [str(config)])[1] == []
  (tmp_path / 'run.json').write_text('{"initial_checkpoint_path": null}')
  assert flags.expand('train', {}, [str(config)])[1] == [mine]
  assert mine in flags.expand('eval', {}, [str(config), 'runs/eval.gin'])[1]
  assert mine in flags.expand('eval', {}, run=str(tmp_path))[1]
  for macro in ({'model_dir': 'new'}, {'model_dir': 'new', 'steps': 3}):
    bindings = flags.expand('train', macro, [str(config)])[1]
    assert "MODEL_DIR = 'new'" in bindings and mine not in bindings


def test_what_is_no_run_is_said(tmp_path, capsys):
  assert cli.main(['eval', str(tmp_path)]) == 2
  assert 'is not a run of ptune train: it has no config.gin' in (
    capsys.readouterr().err
  )
  args = argparse.Namespace(runs=[str(tmp_path)], base=None, prompts=None)
  with pytest.raises(UserError, match='no run of ptune train'):
    serve.take_from_runs(args)


def test_a_run_in_a_directory_called_runs_is_no_gin_file(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  run = tmp_path / 'runs' / 'mine'
  run.mkdir(parents=True)
  (run / 'config.gin').write_text('')
  (run / 'run.json').write_text('{"initial_checkpoint_path": "ptune://tiny"}')
  files, _ = flags.expand('eval', {}, (), 'runs/mine')
  assert files == ['runs/mine/config.gin', 'runs/eval.gin']


def test_the_names_of_other_programs_are_not_ours():
  known = {*flags.names(), *flags.NAMED}
  assert {*flags.ELSEWHERE.values()} <= known
  assert known.isdisjoint(flags.ELSEWHERE)
