"""What the `ptune` command and its gin files accept, and what they refuse."""

import copy
import dataclasses
import itertools
import json
import logging as python_logging
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import logging

import gin
from ptune import cli
from ptune.config import gin_files
from ptune.errors import UserError
from ptune.model import model_info, parameters, partitioning, sizes
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_gin_from_elsewhere():
  gin.clear_config()
  yield
  gin.clear_config()


@pytest.fixture(autouse=True)
def settings_as_before():
  """Restores the process-wide settings that a command changes."""
  names = ('jax_compilation_cache_dir',)
  before = {name: getattr(jax.config, name) for name in names}
  verbosity, handlers = logging.get_verbosity(), [*python_logging.root.handlers]
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  logging.set_verbosity(verbosity)
  python_logging.root.handlers[:] = handlers


@pytest.fixture
def says(capsys):
  """Runs a command in this process; returns its status and last message."""

  def run(*arguments):
    gin.clear_config()
    with tiny.one_device():
      try:
        status = cli.main(list(arguments))
      except SystemExit as error:  # From argparse.
        status = error.code
    return status, capsys.readouterr().err

  return run


def train_with(*more, without=(), **macros):
  """Returns a valid `train` command line with the given changes."""
  macros = {'MODEL_DIR': '/nowhere', 'TRAIN_STEPS': 4, **macros}
  line = tiny.arguments('train', *more, **macros)
  return [a for a in line if not any(part in a for part in without)]


# ------------------------------------------------------------- command lines


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['trian'], "invalid choice: 'trian'"),
    ([], 'the following arguments are required: COMMAND'),
    (
      ['train'],
      'no settings were given; usage:\n       ptune train --base=BASE',
    ),
    (['train', '--lr', '0.3'], '--lr; did you mean --learning_rate'),
    (['train', '--modl_dir=/x'], '--modl_dir=/x; did you mean --model_dir'),
    (['train', '--process_count=2'], 'together, or none of them'),
    (
      [
        *('train', '--coordinator_address=a:1', '--process_count=1'),
        '--process_index=5',
      ],
      '--process_index is 5; expected 0 to 0',
    ),
    (
      [
        *('train', '--coordinator_address=a', '--process_count=2'),
        '--process_index=1',
      ],
      'expected host:port of process 0',
    ),
    (
      ['train', '--gin_file=models/t5_1_1_smal.gin'],
      'did you mean models/t5_1_1_small.gin',
    ),
  ],
)
def test_a_wrong_command_is_answered_in_a_line(says, arguments, message):
  status, said = says(*arguments)
  assert status == 2
  assert message in said and 'Traceback' not in said


@pytest.mark.parametrize(
  ('binding', 'message'),
  [
    # Macros.
    ('TRIAN_STEPS=5', "no macro 'TRIAN_STEPS'; did you mean TRAIN_STEPS"),
    ('train_steps=5', "no macro 'train_steps'; did you mean TRAIN_STEPS"),
    ('XQZ=5', "no macro 'XQZ'; there are BATCH_SIZE, BEST_METRIC"),
    (
      'PROMPT_FILE="a"',
      'has no effect: no gin file reads it; prompts/f',
    ),
    # Values.
    (
      'TRAIN_STEPS',
      'has no value; expected --gin.NAME=VALUE, such as --gin.TRA',
    ),
    ('TRAIN_STEPS 5', 'has no value'),
    ('TRAIN_STEPS=', 'cannot be read .*Write values as in Python'),
    (
      'MODEL_DIR=/tmp/x',
      'a string needs quotes, .* --gin.MODEL_DIR="\'/runs/sst2',
    ),
    ('TRAIN_STEPS=abc', 'cannot be read'),
    ('LEARNING_RATE=inf', 'cannot be read'),
    ("MODEL_DIR='/x", 'cannot be read'),
    ("TASK_FEATURE_LENGTHS={'inputs': 3", 'cannot be read'),
    # Types.
    (
      "TRAIN_STEPS='a'",
      r"TRAIN_STEPS \(training steps of this run\) is 'a'; expected a whole",
    ),
    ('TRAIN_STEPS=1e3', 'is 1000.0; expected a whole number .*, e.g. 30000'),
    ('TRAIN_STEPS=True', 'is True; expected a whole number'),
    ('BATCH_SIZE=None', 'BATCH_SIZE .* is None; expected a whole number'),
    ("PROMPT_LENGTH='a'", "PROMPT_LENGTH .* is 'a'; expected a whole number"),
    ("LEARNING_RATE='a'", "LEARNING_RATE .* is 'a'; expected a number"),
    ("TASK_FEATURE_LENGTHS='a'", "is 'a'; expected a dict, .* {'inputs'"),
    ('MODEL_DIR=None', 'MODEL_DIR is None; it must be a directory'),
    # Names.
    ('trian.seed=5', "matching 'trian'; there are .*train.train"),
    ('train.sede=5', "parameter named 'sede'; did you mean seed"),
    ('Decoding.num_beam=5', 'did you mean num_beams'),
    ('OPTIMIZER=@optim.adam', 'did you mean optim.adamw or optim.adafactor'),
    ('METHOD=@prompt.promt()', 'did you mean prompt.prompt'),
    # Settings.
    (
      'PROMPT_LENGTH=0',
      'PROMPT_LENGTH .* is 0; expected a whole number from 1',
    ),
    (
      'TRAIN_STEPS=0',
      'TRAIN_STEPS .* is 0; expected a whole number from 1',
    ),
    ('MODEL_PARALLEL=2', 'does not divide the 1 devices'),
    ("DTYPE='float16'", "expected 'float32' or 'bfloat16'"),
    ("optim.schedule.decay='x'", "decay 'x' is not one of"),
    ('Decoding.top_p=2', 'top_p'),
    ('Decoding.num_beams=0', 'num_beams is 0; it must be at least 1'),
    ('Decoding.temperature=-1', 'temperature'),
    (
      "MIXTURE_OR_TASK_NAME='tinny'",
      'not among the .* registered names; did you mean tiny',
    ),
    ("INITIAL_CHECKPOINT_PATH='/no'", 'Nothing is at /no'),
  ],
)
def test_a_wrong_flag_is_answered_in_a_line(says, tmp_path, binding, message):
  run = tmp_path / 'run'
  status, said = says(*train_with(f'--gin.{binding}', MODEL_DIR=str(run)))
  assert status == 2
  *_, answer = re.split(r'^ptune train: ', said, flags=re.MULTILINE)
  assert re.search(message, answer), answer
  assert 'In call to configurable' not in said and 'Traceback' not in said
  assert not run.exists()


def test_all_that_is_missing_is_named_with_an_example(says):
  status, said = says(*train_with(without=['MODEL_DIR', 'TRAIN_STEPS']))
  assert status == 2
  assert '--gin.MODEL_DIR="\'/runs/sst2\'"' in said
  assert '--gin.TRAIN_STEPS=30000' in said
  _, said = says(*train_with(without=['tiny.gin', 'INITIAL_CHECK', 'prompts/']))
  assert '--gin.INITIAL_CHECKPOINT_PATH="\'/models/t5_1_1_small\'"' in said
  _, said = says(
    *train_with(without=['tiny.gin'], INITIAL_CHECKPOINT_PATH=None)
  )
  assert 'MODEL, the sizes of the network, is not set, and there is no' in said
  _, said = says(*train_with(without=['prompts/', 'PROMPT_LENGTH']))
  assert 'METHOD, by a --gin_file: one of methods/adept.gin' in said
  assert 'OPTIMIZER' not in said
  _, said = says(*train_with(without=['runs/']))
  assert 'no gin file says which program to run; add --gin_file=runs/' in said
  _, said = says('eval', *train_with()[1:])
  assert (
    'no gin file says which program to run; add --gin_file=runs/eval.gin'
    in said
  )


def test_a_bug_shows_where_it_is(monkeypatch):
  monkeypatch.setattr(cli, '_parse', lambda given: gin_files)  # Has no program.
  with pytest.raises(AttributeError):
    cli.main(['train'])


@pytest.mark.parametrize(
  'fault',
  [
    lambda *_: int('x'),  # A ValueError from Python,
    lambda *_: np.zeros((2, 3)).reshape(4),  # and one from NumPy,
    lambda *_: (_ for _ in ()).throw(KeyError('x')),
    lambda *_: None + 1,
  ],
)
def test_an_error_that_ptune_did_not_foresee_is_not_hidden(
  says, monkeypatch, fault
):
  monkeypatch.setattr('ptune.training.start.seqio_task.load', fault)
  with pytest.raises((ValueError, KeyError, TypeError)):
    says(*train_with())


def test_a_failure_is_told_from_a_wrong_command(says, monkeypatch):
  for error, status in (
    (UserError('wrong'), 2),
    (FileNotFoundError('wrong'), 2),
    (OSError('no space'), 1),
    (FloatingPointError('nan'), 1),
  ):

    def fail(*args, error=error):
      raise error

    monkeypatch.setattr(cli, '_read', fail)
    assert says('train') == (status, f'ptune train: {error}\n')


def test_errors_of_jax_and_tensorflow_that_users_can_mend(says, monkeypatch):
  class OpError(Exception):
    """As TensorFlow's, for a bucket."""

  full = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory\nmore')
  for error, answer in (
    (
      full,
      'RESOURCE_EXHAUSTED: Out of memory\nThe memory of the device is too',
    ),
    (OpError('no such bucket\nmore'), 'no such bucket\n'),
  ):

    def fail(*args, error=error):
      raise error

    monkeypatch.setattr(cli, '_read', fail)
    status, said = says('train')
    assert status == 1
    assert said.startswith(f'ptune train: {answer}')


# ------------------------------------------------------------------ processes


def test_a_stop_while_a_run_is_set_up_changes_nothing(tmp_path):
  run = tmp_path / 'run'
  status, said = tiny.command(
    *tiny.arguments(
      'train',
      MIXTURE_OR_TASK_NAME='tiny_interrupted',
      MODEL_DIR=str(run),
      TRAIN_STEPS=4,
    )
  )
  assert status == 0
  assert 'stopped by SIGTERM; MODEL_DIR is unchanged; the same command' in said
  assert set(tiny.files(run)) <= {'run.lock'}


@pytest.mark.slow
def test_a_stopped_evaluation_says_so(tmp_path):
  arguments = tiny.arguments(
    'eval',
    MIXTURE_OR_TASK_NAME='tiny_interrupted',
    MODEL_DIR=str(tiny.trained()),
    EVAL_OUTPUT_DIR=str(tmp_path / 'out'),
  )
  status, said = tiny.command(*arguments)
  assert status == 130
  assert 'ptune eval: stopped by SIGTERM; nothing was written' in said


def test_a_module_is_the_command(tmp_path):
  line = ['--gin_file=models/none.gin']
  by_module = subprocess.run(
    [sys.executable, '-m', 'ptune.train', *line],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  code = 'import sys; from ptune.cli import main; sys.exit(main())'
  by_command = subprocess.run(
    [sys.executable, '-c', code, 'train', *line],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert by_module.returncode == by_command.returncode == 2
  assert by_command.stderr.startswith('ptune train: there is no gin file')
  assert by_module.stderr.endswith(by_command.stderr)


# --------------------------------------------------------------------- config


def operative(order, bindings=()):
  gin.clear_config()
  gin_files.parse(order, bindings)
  return gin.config_str()


def test_the_order_of_gin_files_makes_no_difference(tmp_path):
  mine = tmp_path / 'mine.gin'
  mine.write_text('BATCH_SIZE = 16\nEVAL_PERIOD = 5\n')
  files = [
    *('models/t5_small.gin', 'prompts/from_class_labels.gin'),
    *('runs/train.gin', 'methods/prompt.gin', str(mine)),
  ]
  configs = {operative(order) for order in itertools.permutations(files)}
  assert len(configs) == 1
  (config,) = configs
  assert 'BATCH_SIZE = 16' in config  # The user's file overrides ours,
  config = operative(files, ['BATCH_SIZE=8', 'BATCH_SIZE=24'])
  assert 'BATCH_SIZE = 24' in config  # and a flag overrides the file.


def test_files_that_set_the_same_are_refused(tmp_path):
  one, two, three = (tmp_path / f'{i}.gin' for i in range(3))
  one.write_text('EVAL_PERIOD = 5\n')
  two.write_text('EVAL_PERIOD = 6\n')
  three.write_text(f"include '{one}'\nEVAL_PERIOD = 7\n")
  runs = ['runs/train.gin', 'prompts/sampled_vocab.gin']
  for files, message in (
    (['models/t5_small.gin', 'models/t5_base.gin'], 'both set MODEL; choose'),
    ([*runs, 'prompts/from_file.gin'], 'both set prompt.prompt.init'),
    (['runs/train.gin', 'runs/eval.gin'], 'both set MIXTURE_OR_TASK_MODULE'),
    ([*runs, 'methods/full.gin'], 'both set METHOD'),
    ([*runs, str(one), str(two)], '0.gin and .*1.gin both set EVAL_PERIOD'),
  ):
    with pytest.raises(UserError, match=message):
      operative(files)
  # A file may override values of a file that it includes.
  assert 'EVAL_PERIOD = 7' in operative([*runs, str(three)])


def test_what_is_wrong_in_a_file_is_named_by_file_and_line(tmp_path):
  mine = tmp_path / 'mine.gin'
  for text, message in (
    ('TRIAN_STEPS = 5', 'mine.gin sets TRIAN_STEPS, .* mean TRAIN_STEPS'),
    (
      '\nTRAIN_STEPS = ',
      'mine.gin, line 2: TRAIN_STEPS =: this cannot be read',
    ),
    ('import no_such', "line 1: import no_such: No module named 'no_such'"),
    ("include 'runs/trian.gin'", 'includes .* did you mean runs/train.gin'),
    ('train.train.sede = 4', 'line 1: .* did you mean seed'),
    ('trian.train.seed = 4', "No configurable matching 'trian.train'; did you"),
  ):
    mine.write_text(f'{text}\n')
    with pytest.raises(UserError, match=message):
      operative(['runs/train.gin', str(mine)])
  # Users may define their own macros.
  mine.write_text('WIDTH = 3\nBATCH_SIZE = %WIDTH\n')
  operative(['runs/train.gin', str(mine)], ['WIDTH=8'])


def test_gin_files_are_found_where_they_may_lie(tmp_path, monkeypatch):
  (tmp_path / 'a' / 'deep').mkdir(parents=True)
  (tmp_path / 'a' / 'deep' / 'my.gin').write_text("include 'deep/more.gin'\n")
  (tmp_path / 'a' / 'deep' / 'more.gin').write_text('BATCH_SIZE = 48\n')
  (tmp_path / 'here.gin').write_text('EVAL_PERIOD = 7\n')
  monkeypatch.chdir(tmp_path)
  files = ['runs/train.gin', 'deep/my.gin', 'here.gin']
  with pytest.raises(UserError, match=r"no gin file 'deep/my.gin'"):
    operative(files)
  gin.clear_config()
  gin_files.parse(files, search_paths=[str(tmp_path / 'a')])
  assert 'BATCH_SIZE = 48' in gin.config_str()
  assert 'EVAL_PERIOD = 7' in gin.config_str()


def test_directories_may_have_the_names_of_ours(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)  # Like the working directory.
  for name in ('models', 'methods', 'runs'):
    (tmp_path / name).mkdir()
  (tmp_path / 'mine.gin').write_text("include 'models/t5_1_1_small.gin'\n")
  files = ['mine.gin', 'prompts/from_class_labels.gin', 'runs/pretrain.gin']
  for file in files:
    gin.clear_config()
    gin_files.parse([file])
  assert gin.query_parameter('%LEARNING_RATE') == 0.01


def test_beams_can_be_set_by_a_flag():
  files = ['models/t5_small.gin', 'methods/prompt.gin', 'runs/eval.gin']
  for name in ('Decoding', 'models.Decoding'):
    config = operative(files, [f'{name}.num_beams=4'])
    assert 'models.Decoding.num_beams = 4' in config


def test_config_gin_reruns_the_run(says, tmp_path):
  first, again = tmp_path / 'first', tmp_path / 'again'
  macros = {'MIXTURE_OR_TASK_NAME': 'tiny_no_metrics', 'EVAL_SPLIT': None}
  line = train_with(
    '--gin.optim.schedule.warmup_steps=2', MODEL_DIR=str(first), **macros
  )
  assert says(*line)[0] == 0
  status, _ = says(
    'train', f'--gin_file={first}/config.gin', f'--gin.MODEL_DIR="{again}"'
  )
  assert status == 0
  one, two = (
    np.load(path / 'prompts' / 'step_4.npy') for path in (first, again)
  )
  assert np.array_equal(one, two)
  text = (first / 'config.gin').read_text()
  assert text.replace(str(first), str(again)) == (
    (again / 'config.gin').read_text()
  )


def test_a_directory_may_be_given_relative_to_the_working_one(
  says, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  os.symlink(tiny.base(), tmp_path / 'base')
  line = train_with(
    MODEL_DIR='run',
    INITIAL_CHECKPOINT_PATH='base',
    MIXTURE_OR_TASK_NAME='tiny_no_metrics',
    EVAL_SPLIT=None,
  )
  assert says(*line)[0] == 0
  facts = json.loads((tmp_path / 'run' / 'run.json').read_text())
  assert facts['initial_checkpoint_path'] == str(tmp_path / 'base')


FILES = {kind: gin_files.own_files([kind]) for kind in gin_files.KINDS}
NEEDED = [
  *("INITIAL_TEXT='yes'", "PROMPT_FILE='p.npy'", "INITIAL_CHECKPOINT_PATH='b'"),
  *("MODEL_DIR='m'", "MIXTURE_OR_TASK_NAME='t'", 'TRAIN_STEPS=1'),
  "TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 4}",
  "SOURCE_PROMPTS=['p.npy']",
]


# We test these with every model, and other methods with one of each family.
EVERYWHERE = ('methods/prompt.gin', 'methods/full.gin', *FILES['prompts'])


def chosen():
  """Returns the model and the method that gin has parsed."""
  return [
    copy.deepcopy(gin.query_parameter(f'{name}/macro.value'))
    for name in ('MODEL', 'METHOD')
  ]


@pytest.mark.parametrize(
  ('run', 'macro'),
  [('train', 'INITIAL_CHECKPOINT_PATH'), ('eval', 'CHECKPOINT_PATH')],
)
def test_sizes_are_read_from_the_base_if_no_model_is_named(run, macro):
  files = ['methods/prompt.gin', f'runs/{run}.gin']
  for base, expected in (
    (tiny.base(), tiny.CONFIG),
    ('ptune://tiny', sizes.T5Config(3000, 96, 4, 24, 192, 3, 2)),
  ):
    gin.clear_config()
    gin_files.parse(files, [f'{macro}={base!r}', "DTYPE='bfloat16'"])
    dropout = 0.1 if run == 'train' else 0.0
    assert chosen()[0] == dataclasses.replace(
      expected, dtype='bfloat16', dropout_rate=dropout
    )


# We test every method with these models. They cover all kinds and proportions;
# the other models differ only in size.
WITH_ALL = ('nano', 't5_small', 't5_1_1_small', 't5_11b', 'byt5_small')


def shallow(config):
  """Returns a config with one layer per stack; further layers are the same."""
  if isinstance(config, sizes.T5Config):
    return dataclasses.replace(
      config, num_encoder_layers=1, num_decoder_layers=1
    )
  stacks = {
    name: dataclasses.replace(getattr(config, name), num_layers=1)
    for name in ('encoder', 'decoder')
  }
  return dataclasses.replace(config, **stacks)


@pytest.mark.slow
def test_every_model_method_and_run_fit_together():
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  # Methods that start from a text need losses/distill.gin, which sets them.
  alone = [f for f in FILES['methods'] + FILES['prompts'] if 'context' not in f]
  ways = [
    *itertools.product(
      alone,
      ['runs/train.gin', 'runs/eval.gin', 'runs/infer.gin'],
    ),
    *((None, run) for run in FILES['runs'] if 'pretrain' in run),
  ]
  two = [
    way for way in ways if way[0] in ('methods/prompt.gin', 'methods/full.gin')
  ]
  few = {f'models/{model}.gin' for model in WITH_ALL}
  assert few <= set(FILES['models'])
  planned = {}
  # Model families differ in the sites of adapters; sizes of a family do not.
  some = ('models/t5_1_1_small.gin', 'models/t5_small.gin')
  for model in sorted({*FILES['models']} - {gin_files.DEFAULT_MODEL}):
    for method, run in ways if model in few else two:
      if model not in some and method and method not in EVERYWHERE:
        continue
      gin.clear_config()
      files = [file for file in (model, method, run) if file]
      gin_files.parse(files, NEEDED)
      config, method = chosen()
      config = dataclasses.replace(shallow(config), dropout_rate=0.0)
      if (config, method.name) not in planned:
        plan = parameters.plan(config, method, mesh)
        planned[config, method.name] = plan.trainable
  configs = {config for config, _ in planned}
  assert all(planned[config, 'prompt'] for config in configs)
  assert all(len(planned[config, 'full']) > 20 for config in configs)


def test_small_has_the_published_number_of_parameters():
  gin_files.parse(
    ['models/t5_1_1_small.gin', 'methods/prompt.gin', 'runs/eval.gin']
  )
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  summary = model_info.summary(parameters.plan(*chosen(), mesh))
  assert 'trainable 51,200 parameters' in summary
  assert 'frozen 76,961,152 parameters' in summary


def test_every_macro_of_the_files_is_described():
  own = gin_files.own_directory()
  read = {
    name
    for kind in ('methods', 'models', 'prompts', 'runs', 'studies')
    for file in FILES[kind]
    for name in re.findall(r'%([A-Z_]+)', (own / file).read_text())
  }
  assert read <= set(gin_files.MACROS)
