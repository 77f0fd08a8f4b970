"""Errors call a setting as the user wrote it."""

import pytest

import gin
import ptune
from ptune import cli
from ptune.config import words
from ptune.errors import UserError
from tests import tiny

ROWS = [('so good', 'yes'), ('so bad', 'no')]


@pytest.mark.parametrize(
  ('message', 'flags', 'arguments'),
  [
    ('TRAIN_STEPS is 0.', '--steps is 0.', 'steps is 0.'),
    ('set RANK = True: a', 'set --rank=True: a', 'set rank=True: a'),
    (
      'e.g. --gin.MODEL_DIR="\'/runs/a\'"',
      "e.g. --model_dir='/runs/a'",
      "e.g. model_dir='/runs/a'",
    ),
    ('--gin.PROMPTS has no effect', '--prompts has no', 'prompts has no'),
    ("TASK_FEATURE_LENGTHS['a']", '--task_feature_', 'task_feature_'),
    (
      "TASK_FILES['train'] has 'a.csv'",
      "--train has 'a.csv'",
      "train has 'a.csv'",
    ),
    ("PTUNE_VOCABULARY 'RANK' RANK.tsv", 'PTUNE_VOCABULARY', 'PTUNE_VOCABULAR'),
    ('LABEL_NAMES and RANDOM_SEED', '--labels and --seed', 'labels and seed'),
    ('no CPU, no GPU', 'no CPU, no GPU', 'no CPU, no GPU'),
  ],
)
def test_macros_become_flags_or_arguments(message, flags, arguments):
  all_flags = words.of_flags('train', ['train'], alone=True)
  assert words.renamed(message, all_flags).startswith(flags)
  assert words.renamed(message, words.of_arguments()).startswith(arguments)
  if 'VOCABULARY' in message:
    assert words.renamed(message, all_flags) == message


@pytest.fixture
def says(capsys):
  """Runs a command, and returns what it said."""

  def run(*arguments):
    gin.clear_config()
    assert cli.main(arguments) == 2
    gin.clear_config()
    return capsys.readouterr().err

  return run


def test_the_command_line_gets_its_own_words(says, tmp_path):
  train = (
    *('train', '--base=ptune://tiny', '--inputs={a}', '--targets={b}'),
    f'--train={tmp_path}/rows.csv',
  )
  said = says(*train, '--seed=-1')
  assert said.startswith('ptune train: --seed (seed of data order')
  assert 'to be set: --model_dir (' in says(*train)
  model_dir = f'--model_dir={tmp_path}/run'
  assert f"--train names '{tmp_path}/rows.csv', which" in says(
    *train, model_dir
  )
  (tmp_path / 'rows.csv').write_text('a,b\nx,y\nx\n')
  assert 'set --skip_bad_rows=True to leave' in says(*train, model_dir)
  said = says(*train, '--seed=-1', '--gin.BATCH_SIZE=0')
  assert '--seed (' in said and '\nBATCH_SIZE (' in f'\n{said[13:]}'


def test_the_log_has_the_words_of_the_user(tmp_path, capsys, caplog):
  (tmp_path / 'rows.csv').write_text('a,b\nso good so good,yes\n')
  train = (
    *('train', '--base=ptune://tiny', '--inputs={a}', '--targets={b}'),
    *(f'--train={tmp_path}/rows.csv', f'--model_dir={tmp_path}/run'),
    *('--batch_size=1', '--prompt_length=2', '--steps=1'),
    "--task_feature_lengths={'inputs': 2, 'targets': 2}",
  )
  with tiny.one_device():
    assert cli.main(train) == 0
  gin.clear_config()
  said = capsys.readouterr().err
  assert "trimmed to --task_feature_lengths {'inputs': 2" in said
  assert '--eval_split is' in said
  assert 'TASK_FEATURE' not in said
  caplog.clear()
  lengths = {'inputs': 2, 'targets': 2}
  small = {'batch_size': 1, 'prompt_length': 2, 'steps': 1}
  with tiny.one_device():
    ptune.tune('ptune://tiny', ROWS[:1], task_feature_lengths=lengths, **small)
  assert 'trimmed to task_feature_lengths {' in caplog.text


def test_a_word_of_gin_stays_without_flags(says):
  said = says('train', '--gin_file=runs/train.gin', '--gin.RANDOM_SEED=-1')
  assert said.startswith('ptune train: RANDOM_SEED (')


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'rank': True}, '^rank is True, but there are no labels to score'),
    ({'inputs': 'x'}, "^inputs is 'x', which is the same for all rows"),
    ({'infer_file': 'a'}, '^infer_file has no effect'),
    (
      {'bindings': ['x']},
      '^x has no value; expected NAME=VALUE, such as steps',
    ),
    ({'train': [*ROWS, 5]}, 'set skip_bad_rows=True to leave out'),
    ({'train': 'no.csv'}, "^train names '.*/no.csv', which does not"),
  ],
)
def test_python_gets_the_names_of_arguments(given, message):
  with pytest.raises(UserError, match=message) as error:
    ptune.tune('ptune://tiny', **{'train': ROWS, **given})
  assert 'configurable' not in str(error.value)


def test_a_missing_base_is_told_without_gin(tmp_path):
  with pytest.raises(FileNotFoundError) as error:
    ptune.tune('ptune://tiny', ROWS, vocabulary=str(tmp_path / 'nosuch'))
  assert 'Nothing is at' in str(error.value)
  assert 'configurable' not in str(error.value)
