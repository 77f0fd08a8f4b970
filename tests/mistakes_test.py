"""A user's mistake gives one error that says how to fix it, and no files.

Each command has exactly one mistake. Together, the mistakes cover all packages
of ptune, and `ptune.tasks`. Each one ends with status 2, wherever it is
raised, in a checkout and in a wheel (`packaging_test` runs this file with
one).
"""

import ast
import functools
import logging as python_logging
import os
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from absl import logging

import gin
from ptune import cli, pretrained
from ptune.config import gin_files
from tests import imports_test, tiny

ROWS = ''.join(f'film {i}\t{i % 2}\n' for i in range(16))
GIN = """\
include 'models/tiny.gin'
include 'tasks/from_files.gin'
TASK_FILES = {'train': 'good.tsv', 'validation': 'good.tsv'}
INPUTS = '{sentence}'
TARGETS = '{label}'
LABEL_NAMES = ['negative', 'positive']
VOCABULARY = 'ptune://tiny'
TASK_FEATURE_LENGTHS = {'inputs': 16, 'targets': 8}
"""
FILES = {
  'mine.gin': GIN,
  'good.tsv': f'sentence\tlabel\n{ROWS}',
  'empty.tsv': '',
  'unlabelled.tsv': 'sentence\tlabel\na\t-1\nb\t-1\n',
  'header.tsv': 'sentence\tlabel\n',
  'label.tsv': f'sentence\tlabel\n{ROWS}more\t7\n',
  'column.tsv': f'text\tlabel\n{ROWS}',
  'latin1.tsv': f'sentence\tlabel\ncaf\xe9\t1\n{ROWS}'.encode('latin-1'),
  'deep.jsonl': '[' * 100_000,
  'int.jsonl': '{"sentence": "a", "label": ' + '9' * 5000 + '}\n',
  'scalar.jsonl': '3\n[1]\n',
  'garbage.npy': b'garbage',
  'raises.py': 'raise KeyError("boom")\n',
  'syntax.py': 'def (:\n',
  'exits.py': 'import sys\nsys.exit(0)\n',
}

CONFIG = f'{pretrained.directory("ptune://tiny")}/config.json'


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """Returns a working directory with FILES."""
  path = tmp_path_factory.mktemp('mistakes')
  for name, content in FILES.items():
    content = content.encode() if isinstance(content, str) else content
    (path / name).write_bytes(content)
  os.mkfifo(path / 'pipe.tsv')
  width = 96
  (path / 'empty').mkdir()
  header = b'{}' + b' ' * 90_000
  (path / 'empty' / 'model.safetensors').write_bytes(
    len(header).to_bytes(8, 'little') + header
  )
  shutil.copy(CONFIG, path / 'empty')
  for name, array in (
    ('good', np.ones((5, width), np.float32)),
    ('nan', np.full((5, width), np.nan, np.float32)),
    ('narrow', np.ones((5, width - 1), np.float32)),
  ):
    np.save(path / f'{name}.npy', array)
  return path


@pytest.fixture(autouse=True)
def settings_as_before(place, monkeypatch):
  """Restores the process-wide settings that a command changes."""
  monkeypatch.chdir(place)
  monkeypatch.setattr(sys, 'path', [*sys.path, str(place)])
  cache, handlers = (
    jax.config.jax_compilation_cache_dir,
    [*python_logging.root.handlers],
  )
  verbosity = logging.get_verbosity()
  yield
  gin.clear_config()
  jax.config.update('jax_compilation_cache_dir', cache)
  logging.set_verbosity(verbosity)
  python_logging.root.handlers[:] = handlers


def line(program, *more, **macros):
  """Returns a valid command line with the given changes."""
  own = {
    'train': {
      'MODEL_DIR': 'run',
      'TRAIN_STEPS': 2,
      'BATCH_SIZE': 4,
      'INITIAL_CHECKPOINT_PATH': 'ptune://tiny',
    },
    'eval': {
      'EVAL_OUTPUT_DIR': 'run',
      'CHECKPOINT_PATH': 'ptune://tiny',
      'PROMPT_FILE': 'good.npy',
    },
  }[program]
  method = 'prompts/random_uniform.gin'
  return [
    program,
    '--gin_file=mine.gin',
    f'--gin_file=runs/{program}.gin',
    f'--gin_file={method if program == "train" else "methods/prompt.gin"}',
    *(
      f'--gin.{name}={value!r}'
      for name, value in {'PROMPT_LENGTH': 5, **own, **macros}.items()
    ),
    *more,
  ]


train, evaluate = (functools.partial(line, p) for p in ('train', 'eval'))


def files(name, **more):
  return {'TASK_FILES': {'train': name, 'validation': 'good.tsv', **more}}


# The package that raises the error, the command, and the message.
MISTAKES = [
  ('cli', ['train'], 'no settings were given; usage'),
  ('config', ['eval', 'good.tsv'], 'good.tsv'),
  ('config', train('--gin_file=nosuch.gin'), "no gin file 'nosuch.gin'"),
  ('config', train('--gin.TRAIN_STEPS=abc'), 'cannot be read'),
  ('config', train(BATCH_SIZE=None), 'BATCH_SIZE .* is None; expected'),
  (
    'config',
    train("--gin.models.Decoding.top_k='5'"),
    'top_k .*expected a whole number',
  ),
  ('host', ['inspect', 'foo://a'], 'one that begins with gs://'),
  ('errors', train('--gin.sizes.t5.num_heads=0'), 'num_heads is 0; expected'),
  ('model', train('--gin.models.Decoding.num_beams=0'), 'num_beams is 0'),
  ('config', train(CLASS_LABELS=['a', 'b']), 'CLASS_LABELS has no effect'),
  ('pretrained', ['inspect', 'ptune://huge'], 'does not come with ptune'),
  ('convert', ['inspect', 'good.tsv'], 'good.tsv'),
  ('convert', train(INITIAL_CHECKPOINT_PATH='hf://../../etc'), 'not a name on'),
  ('convert', train(INITIAL_CHECKPOINT_PATH='good.tsv'), 'good.tsv is a file'),
  (
    'convert',
    train(INITIAL_CHECKPOINT_PATH='/nosuch'),
    'Nothing is at /nosuch',
  ),
  ('convert', ['inspect', 'empty'], 'weights without a single tensor'),
  # Users' data.
  ('tasks', train(**files('label.tsv')), "label.tsv:18: unknown label '7'"),
  ('tasks', train(**files('column.tsv')), "no column 'sentence'"),
  ('tasks', train(**files('empty.tsv')), 'empty.tsv.* empty'),
  (
    'training',
    train(TASK_FILES={'train': 'good.tsv', 'validation': 'unlabelled.tsv'}),
    'none of the validation rows has a label',
  ),
  ('tasks', train(**files('header.tsv')), 'with no rows'),
  ('tasks', train(**files('latin1.tsv')), 'latin1.tsv:2: .*not UTF-8'),
  ('tasks', train(**files('deep.jsonl')), 'deep.jsonl:1: '),
  ('tasks', train(**files('int.jsonl')), 'int.jsonl:1: '),
  ('tasks', train(**files('scalar.jsonl')), 'scalar.jsonl:1, .*JSON object'),
  ('host', train(**files('pipe.tsv')), 'a pipe'),
  # A split that training does not read is wrong before training.
  ('convert', train(**files('good.tsv', test='none.tsv')), r"'test'\] names"),
  ('tasks', train(**files('good.tsv', test='column.tsv')), 'no column'),
  ('convert', train(**files('hf://me/a.csv')), 'from_hugging_face.gin'),
  ('convert', train(**files('hf://me/*.csv')), 'from_hugging_face.gin'),
  ('tasks', train(INPUTS='{a{b}}'), 'INPUTS'),
  ('tasks', train(TARGETS='{nosuch}'), 'nosuch'),
  ('tasks', train(METRICS=['acuracy']), 'did you mean accuracy'),
  ('tasks', train(LABEL_NAMES=['a', 'a']), 'LABEL_NAMES'),
  ('tasks', train(LABEL_NAMES=['a b', 'a  b']), 'cannot distinguish'),
  ('tasks', train(RANK=True, LABEL_NAMES=None), 'RANK'),
  # The task.
  (
    'data',
    train(TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 1}),
    'do not fit TASK_FEATURE_LENGTHS',
  ),
  ('data', train(TASK_FEATURE_LENGTHS={'inputs': 16}), "length for 'targets'"),
  ('data', train(MIXTURE_OR_TASK_NAME='a/b'), "'a/b' is not among"),
  ('data', train(BATCH_SIZE=4, MICROBATCHES=3), 'MICROBATCHES'),
  *(
    ('data', train(MIXTURE_OR_TASK_NAME='x', MIXTURE_OR_TASK_MODULE=m), said)
    for m, said in (
      ('nosuch', "no module 'nosuch'"),
      ('..', "MIXTURE_OR_TASK_MODULE '..' "),
      ('raises', "raises.py, line 1.*KeyError.*'boom'"),
      ('syntax', 'syntax.py, line 1'),
      ('exits', 'ended Python'),
    )
  ),
  # The run.
  ('training', train('--gin.optim.schedule.decay="x"'), "decay 'x' is not one"),
  ('training', train(BEST_METRIC='acc'), "BEST_METRIC 'acc' is not among"),
  ('training', train(INITIAL_CHECKPOINT_PATH=None), 'INITIAL_CHECKPOINT_PATH'),
  ('training', train(EVAL_SPLIT='nosuch'), "EVAL_SPLIT is 'nosuch'"),
  ('programs', evaluate(EVAL_SPLIT=None), 'EVAL_SPLIT is None'),
  ('host', train(MODEL_DIR='good.tsv'), 'MODEL_DIR .* cannot be written'),
  # A prompt.
  ('methods', evaluate(PROMPT_FILE='garbage.npy'), 'not a NumPy array file'),
  ('methods', evaluate(PROMPT_FILE='nan.npy'), 'NaN or infinity'),
  ('methods', evaluate(PROMPT_FILE='narrow.npy'), r'\[5, 95\]'),
  ('host', evaluate(PROMPT_FILE='pipe.tsv'), 'a pipe'),
  ('methods', evaluate(PROMPT_FILE='nosuch.npy'), 'nosuch.npy'),
  ('serving', evaluate(PROMPT_FILE=None), 'set MODEL_DIR .* or PROMPT_FILE'),
  ('analysis', ['similarity', 'good.npy'], 'cannot be compared with itself'),
  (
    'studies',
    ['study', 'sweep', '--gin.MODEL_DIR="run"', '--gin.MODELS=["x"]'],
    'has no models',
  ),
  ('tools', ['methods', 'nosuch'], 'nosuch'),
]


def room_of(error):
  """Returns the package of the function that raised an error."""
  trace = error.__traceback__
  while trace.tb_next is not None:
    trace = trace.tb_next
  name = trace.tb_frame.f_globals['__name__']
  return imports_test.room_of(name), name


@pytest.mark.parametrize(
  ('room', 'arguments', 'message'),
  MISTAKES,
  ids=[f'{i}-{room}' for i, (room, _, _) in enumerate(MISTAKES)],
)
def test_a_mistake_is_answered_and_leaves_nothing(
  room, arguments, message, place, capsys, monkeypatch
):
  raised = []
  message_of = gin_files.message

  def kept(error):
    raised.append(error)
    return message_of(error)

  monkeypatch.setattr(gin_files, 'message', kept)
  before = sorted(place.iterdir())
  with tiny.one_device():
    status = cli.main(arguments)
  said = capsys.readouterr().err
  assert status == 2, said
  *_, answer = re.split(r'^ptune \w+: ', said, flags=re.MULTILINE)
  assert re.search(message, answer, re.DOTALL), answer
  assert 'Traceback' not in said and 'In call to configurable' not in said
  assert len(answer) < 3000
  left = [p for p in place.iterdir() if p.name != '__pycache__']
  assert sorted(left) == before
  (error,) = raised
  assert room_of(error)[0] == room, room_of(error)


def test_bad_rows_are_listed_where_they_are_skipped(place, capsys):
  with tiny.one_device():
    # Only the label of the last row is wrong; after that, the metric is too.
    status = cli.main(
      train(**files('label.tsv'), SKIP_BAD_ROWS=True, BEST_METRIC='acc')
    )
  said = capsys.readouterr().err
  assert status == 2
  assert 'left out 1 bad row:' in said
  assert "label.tsv:18: unknown label '7'" in said


def test_every_room_that_refuses_is_here():
  """Except T5X's, which may be missing, and Python's, which has no command."""
  refuse = {
    imports_test.room_of(name)
    for name, tree in imports_test.sources().items()
    if 'raise UserError(' in ast.unparse(tree)
  }
  assert refuse - {'t5x_host', 'api'} <= {room for room, _, _ in MISTAKES}
