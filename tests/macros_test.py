"""Wrong macro values are refused before anything is imported or written."""

import ast
import re

import pytest

from ptune.config import gin_files, macros
from ptune.errors import UserError

HUGE = 10**30


def test_every_example_is_a_value_that_its_macro_may_have():
  for name, macro in macros.MACROS.items():
    if '@' not in macro.example:
      assert macro.kind(ast.literal_eval(macro.example)) == '', name


# Users may set these macros to None, with a documented meaning.
NONE = (
  'LABEL_NAMES MODEL_DIR EVAL_STEPS VOCABULARY PROMPTS CLASS_LABELS'.split()
)


@pytest.mark.parametrize('name', sorted(macros.MACROS))
def test_no_macro_takes_whatever_it_is_given(name):
  _, example, kind = macros.MACROS[name]
  for value in ({1: 2}, [[]], object(), float('nan'), -1, HUGE, '', 1j):
    assert kind(value), value
  assert bool(kind(True)) != (example == 'True'), 'a boolean is no number'


@pytest.mark.parametrize(
  ('binding', 'message'),
  [
    ('PACK=None', r'PACK .* is None; expected a whole number from 0'),
    ('PACK=True', 'PACK .* is True'),
    ("DROPOUT_RATE='0.1'", "is '0.1'; expected a number from 0 to 0.999"),
    ('DROPOUT_RATE=1.0', 'expected a number from 0 to 0.999'),
    ('MODEL_PARALLEL=None', 'MODEL_PARALLEL .* expected a whole number'),
    ("RANDOM_SEED='0'", 'RANDOM_SEED .* expected a whole number from 0'),
    (f'RANDOM_SEED={HUGE}', f'RANDOM_SEED .* is {HUGE}; expected'),
    (f'TRAIN_STEPS={HUGE}', 'TRAIN_STEPS .* from 1 to 2147483647'),
    ('BATCH_SIZE=1000000000000', 'BATCH_SIZE .* is 1000000000000; expected'),
    ('LEARNING_RATE=None', 'LEARNING_RATE .* is None; expected a number'),
    ('LEARNING_RATE=-0.1', 'LEARNING_RATE .* is -0.1'),
    ('LEARNING_RATE=1e30', 'LEARNING_RATE .* is 1e[+]30'),
    ('LEARNING_RATE=1e999', 'LEARNING_RATE .* is inf'),
    ('PROMPT_LENGTH=1000000000', 'PROMPT_LENGTH .* from 1 to 65536'),
    (
      "TASK_FEATURE_LENGTHS={'inputs': 1000000000, 'targets': 8}",
      'whose values are a whole number from 1 to 1048576',
    ),
    ("TASK_FEATURE_LENGTHS={'inputs': True, 'targets': 8}", 'whose values'),
    ('TASK_FEATURE_LENGTHS={1: 8}', 'whose keys are texts'),
    ("METRICS='accuracy'", "METRICS .* is 'accuracy'; expected a list"),
    ('METRICS=[None]', 'METRICS .* expected a list whose items are a text'),
    ('TASK_FILES=None', 'TASK_FILES .* is None; expected a dict'),
    ("TASK_FILES={'train': 3}", 'expected a dict whose values are a path'),
    ("TASK_FILES={'train': [['a.tsv']]}", 'expected a dict whose values are'),
    ("TASK_FILES={1: 'a.tsv'}", 'expected a dict whose keys are texts'),
    (r"TASK_FILES={'train': 'a\0.tsv'}", 'a path without NUL characters'),
    (r"MODEL_DIR='/a\0b'", 'MODEL_DIR .* expected a path without NUL'),
    ("MODEL_DIR='foo://a/b'", 'MODEL_DIR .* begins with gs://, s3://'),
    ("MODEL_DIR='file://a'", 'file:///... for the absolute path'),
    ("MODEL_DIR=''", 'MODEL_DIR .* expected a path, not an empty text'),
    ('INPUTS=None', 'INPUTS .* is None; expected a text'),
    ("TASK_NAME='a/b'", 'TASK_NAME .* expected up to 200 letters'),
    ("TASK_NAME='..'", 'TASK_NAME .* and no dot first'),
    ("LABEL_NAMES=['yes']", 'a list with at least 2 items'),
    ("CLASS_LABELS=['no', ' ']", 'CLASS_LABELS .* a text in quotes'),
    ('METHOD=None', 'METHOD .* expected a reference'),
    # A value of another macro, and a macro of the user's own.
    ('BATCH_SIZE=%EVAL_SPLIT', "BATCH_SIZE .* is 'validation'; expected"),
    # These macros never get a value.
    ('BATCH_SIZE=%BATCH_SIZE', 'BATCH_SIZE = %BATCH_SIZE: a macro cannot be'),
    (
      'A=%B\nB=[%C]\nC=%A',
      'A = %B = %C = %A: a macro cannot be its own value',
    ),
    (f'BATCH_SIZE={"[" * 20_000}', 'nested too deeply|cannot be read'),
    ("MODEL_DIR='/\udcff'", 'MODEL_DIR.*cannot be read .*(surrogates|utf-8)'),
  ],
)
def test_a_value_that_a_macro_cannot_have_is_refused(binding, message):
  files = ['runs/train.gin', 'methods/prompt.gin', 'tasks/from_files.gin']
  with pytest.raises(UserError, match=message):
    gin_files.read(files, [binding])


def test_all_wrong_values_are_named_at_once():
  bindings = ['BATCH_SIZE=None', 'LEARNING_RATE=1e30', "MODEL_DIR='x://'"]
  with pytest.raises(UserError) as raised:
    gin_files.read(['runs/train.gin', 'methods/prompt.gin'], bindings)
  lines = str(raised.value).split('\n')
  assert [re.match(r'\w+', line)[0] for line in lines] == sorted(
    binding.split('=')[0] for binding in bindings
  )


def test_a_batch_larger_than_the_memory_is_refused():
  lengths = {'inputs': 2**20, 'targets': 8}
  with pytest.raises(UserError, match=r'BATCH_SIZE=16777216, .* GiB'):
    macros.check({'BATCH_SIZE': 2**24, 'TASK_FEATURE_LENGTHS': lengths})
  macros.check({'BATCH_SIZE': 2**10, 'TASK_FEATURE_LENGTHS': lengths})


def test_what_stands_last_is_checked(tmp_path):
  mine = tmp_path / 'mine.gin'
  mine.write_text("include 'runs/train.gin'\nBATCH_SIZE = None\n")
  gin_files.read([str(mine)], ['BATCH_SIZE=8'])
  with pytest.raises(UserError, match='BATCH_SIZE'):
    gin_files.read([str(mine)])
  # The last of three equal flags counts.
  flags = ['BATCH_SIZE=8', 'BATCH_SIZE=None', 'BATCH_SIZE=8']
  gin_files.read([str(mine)], flags)
  with pytest.raises(UserError, match='BATCH_SIZE'):
    gin_files.read([str(mine)], flags[1:2])


def test_files_that_cannot_be_read_are_named(tmp_path):
  mine, other = tmp_path / 'mine.gin', tmp_path / 'other.gin'
  for content, message in (
    ('BATCH_SIZE = 8'.encode('utf-16'), 'mine.gin is not UTF-8: byte 0xff'),
    ('# é\nBATCH_SIZE = 8'.encode('latin-1'), 'mine.gin is not UTF-8: .* at 2'),
    (b'BATCH_SIZE\0 = 8\n', 'mine.gin, .*cannot be read'),
    (b'train.train:\n\tseed = 1\n  pack = 2\n', 'mine.gin, .*cannot be read'),
    (f"include '{mine}'".encode(), 'mine.gin includes .*mine.gin; remove one'),
    (
      f"include '{other}'".encode(),
      'mine.gin includes .*other.gin includes .*mine.gin; remove one',
    ),
  ):
    mine.write_bytes(content)
    other.write_text(f"include '{mine}'\n")
    with pytest.raises(UserError, match=message):
      gin_files.read(['runs/train.gin', str(mine)])
  # A byte order mark is allowed.
  mine.write_text('BATCH_SIZE = 8\n', encoding='utf-8-sig')
  gin_files.parse(['runs/train.gin', str(mine)])


def test_two_models_are_refused_wherever_they_stand(tmp_path):
  mine, other = tmp_path / 'mine.gin', tmp_path / 'other.gin'
  mine.write_text("include 'models/tiny.gin'\n")
  both = 'models/t5_small.gin and models/tiny.gin both set MODEL'
  with pytest.raises(UserError, match=both):
    gin_files.read([str(mine), 'models/t5_small.gin'])
  other.write_text(f"include '{mine}'\ninclude 'models/t5_small.gin'\n")
  with pytest.raises(UserError, match=both):
    gin_files.read([str(other)])
  # Only one file may choose a method, but files of prompts/ may include one of
  # methods/.
  mine.write_text("include 'methods/prompt.gin'\n")
  gin_files.read([str(mine), 'prompts/random_uniform.gin'])
  with pytest.raises(UserError, match='both set METHOD'):
    gin_files.read([str(mine), 'methods/ia3.gin'])
