"""Runs ptune's modules in T5X; skipped if T5X is not installed.

T5X must be installed from source. `t5x_contract_test` covers what needs no T5X.
Here T5X has 4 x 2 devices and ptune has one. These are tested:

    ten steps of t5x.train and the saved files: every file of gin/methods/ and
      gin/prompts/
    t5x.infer, greedy, with beams, and scores: DECODED
    t5x.eval, greedy and with beams; killed and resumed in both of T5X's
      checkpoint formats: methods/prompt
"""

import functools
import importlib
import itertools
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import warnings
from unittest import mock

import jax
import numpy as np
import pytest

import gin
from ptune import cli, methods
from ptune.convert import open_checkpoint
from ptune.convert.trained import open_trained
from ptune.methods import prompt, prompt_array
from ptune.model import parameters
from ptune.pretrained import VOCABULARY
from tests import QUICK_FLAGS, readme_test, t5x_contract_test, tiny
from tests.methods_test import METHODS
from tests.network_test import load
from tests.t5x_contract_test import ROOT

import seqio  # isort: skip  (after tiny, which quiets TensorFlow)
import tensorflow as tf  # isort: skip

with warnings.catch_warnings():
  warnings.simplefilter('ignore')
  try:
    from ptune import t5x_host
  except ImportError as error:
    pytest.skip(f'T5X cannot be imported: {error}', allow_module_level=True)
  from t5x import gin_utils

# T5X's own code emits warnings.
pytestmark = pytest.mark.filterwarnings('ignore')

place = readme_test.place  # A fixture.

FILES = [
  f'{kind}/{path.stem}'
  for kind in ('methods', 'prompts')
  for path in sorted((ROOT / 'gin' / kind).iterdir())
  # Methods that start from a text's tokens are for losses/distill.gin.
  if not path.stem.endswith('from_context')
]
# Methods that change the contents of the cache, or the decoder's input.
DECODED = ['prompt', 'decoder_prompt', 'multitask', 'prefix', 'prompt_and_lora']
START = 1_100_000
LENGTHS = {'inputs': 16, 'targets': 8}
GIN = """\
from __gin__ import dynamic_registration
from ptune.model import sizes
MODEL = @sizes.t5()
sizes.t5:
  vocab_size = 128
  emb_dim = 32
  num_heads = 4
  head_dim = 8
  mlp_dim = 64
  num_encoder_layers = 2
  num_decoder_layers = 3
"""
# A 4 x 2 mesh: four devices hold different rows, and two different weights.
FOUR_BY_TWO = """\
from __gin__ import dynamic_registration
from t5x import partitioning
partitioning.PjitPartitioner:
  num_partitions = None
  model_parallel_submesh = (1, 1, 1, 2)
"""
# Logs every step and does nothing else. SeqIO would shuffle across epochs.
# Without shuffling, each step's batch is one epoch, as in ptune.
STEPS = """\
from __gin__ import dynamic_registration
import __main__ as train_script
from t5x import utils
train_script.train:
  train_eval_dataset_cfg = None
  infer_eval_dataset_cfg = None
  stats_period = 1
train/utils.DatasetConfig.shuffle = False
"""
SCORED = """\
from __gin__ import dynamic_registration
import __main__ as infer_script
infer_script.infer.mode = 'predict_with_aux'
"""
T5X_ADAFACTOR = """\
from __gin__ import dynamic_registration
from ptune import t5x_host
from t5x import adafactor
t5x_host.Model.optimizer_def = @t5x_host.Trained()
t5x_host.Trained:
  inner = @adafactor.Adafactor()
  method = %METHOD
adafactor.Adafactor:
  decay_rate = 0.8
  weight_decay_rate = 1e-5
  multiply_by_parameter_scale = False
  logical_factor_rules = @t5x_host.factor_rules()
"""
GIN_FILES = {
  'hosted.gin': GIN,
  'four_by_two.gin': FOUR_BY_TWO,
  'steps.gin': STEPS,
  'scored.gin': SCORED,
  't5x_adafactor.gin': T5X_ADAFACTOR,
}


# ---------------------------------------------------------------------- tasks


def rows(split):
  """Returns [{'inputs': [int], 'targets': [int]}]."""
  count = {'train': 8, 'validation': 8, 'test': 5}[split]
  draw = np.random.default_rng(len(split))
  return [
    {
      'inputs': draw.integers(3, 128, draw.integers(2, 15)).tolist(),
      'targets': draw.integers(3, 128, draw.integers(1, 6)).tolist(),
    }
    for _ in range(count)
  ]


def sentences(split):
  """Returns [{'inputs': str, 'targets': str}]."""
  del split
  return [
    {'inputs': f'a {word} film of {year}', 'targets': label}
    for year in range(1990, 1994)
    for word, label in (('good', 'positive'), ('dull', 'negative'))
  ]


def until_eos(prediction):
  """'5 9 1 0' -> [5, 9, 1]."""
  row = [int(token) for token in prediction.split()]
  return row[: row.index(1) + 1] if 1 in row else row


def mean_token(targets, predictions):
  rows = [np.mean(until_eos(row)) for row in predictions]
  return {'mean_token': float(np.mean(rows))}


def mean_score(targets, scores):
  scores = scores[0] if isinstance(scores, tuple) else scores
  return {'mean_score': float(np.mean(scores))}


def add_task(name, rows, vocabulary, kind, *preprocessors):
  """Registers a task whose examples come from a function of the split."""
  splits = ('train', 'validation', 'test')
  counts = {split: len(rows(split)) for split in splits}

  def source(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_generator(
      lambda: rows(split), output_signature={'inputs': kind, 'targets': kind}
    )

  feature = seqio.Feature(vocabulary)
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(
      source, splits=list(counts), num_input_examples=counts
    ),
    preprocessors=preprocessors,
    output_features={'inputs': feature, 'targets': feature},
    metric_fns=[mean_token, mean_score] if 'token' in name else [],
  )


class Numbers(seqio.PassThroughVocabulary):
  """Writes tokens as their ids: '5 9 1'."""

  def _decode(self, ids):
    return ' '.join(map(str, ids))

  def _decode_tf(self, ids):
    return tf.strings.reduce_join(tf.as_string(ids), axis=-1, separator=' ')


TOKENS = Numbers(128, eos_id=1)
SEVERAL = tf.TensorSpec([None], tf.int32)
ONE = tf.TensorSpec([], tf.string)
APPEND = seqio.preprocessors.append_eos_after_trim
add_task('hosted_tokens', rows, TOKENS, SEVERAL, APPEND)
add_task(
  'hosted_text',
  sentences,
  seqio.SentencePieceVocabulary(str(VOCABULARY), 20),
  ONE,
  seqio.preprocessors.tokenize,
  APPEND,
)


# ------------------------------------------------------------------- programs


@pytest.fixture(scope='module', autouse=True)
def settings():
  """Allows rank promotion, which T5X needs."""
  jax.config.update('jax_numpy_rank_promotion', 'allow')
  yield
  jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='module')
def work(tmp_path_factory):
  """Returns a directory for runs that contains the gin files above."""
  directory = tmp_path_factory.mktemp('t5x')
  for name, text in GIN_FILES.items():
    (directory / name).write_text(text)
  return directory


@pytest.fixture(scope='module')
def base(numerics):
  """Returns the base model in T5X's older layout, at step 1,100,000."""
  return str(numerics / 'checkpoints' / 'legacy_base' / f'checkpoint_{START}')


RUN_FILES = {'train': 'finetune', 'eval': 'eval', 'infer': 'infer'}
FUNCTIONS = {'train': 'train', 'eval': 'evaluate', 'infer': 'infer'}


def bindings(macros):
  common = {
    'MIXTURE_OR_TASK_NAME': 'hosted_tokens',
    'MIXTURE_OR_TASK_MODULE': 'tests.t5x_host_test',
    'TASK_FEATURE_LENGTHS': LENGTHS,
  }
  return [f'{k} = {v!r}' for k, v in (common | macros).items()]


def parse(program, search, gin_files, given):
  """Parses gin files like a T5X program; returns the program's function."""
  module = importlib.import_module(f't5x.{program}')
  search = [*search, str(ROOT / 'gin')]
  search.append(os.path.dirname(os.path.dirname(module.__file__)))
  gin.clear_config()
  # T5X's gin files call the program __main__.
  with mock.patch.dict(sys.modules, {'__main__': module}):
    gin_utils.parse_gin_flags([str(path) for path in search], gin_files, given)
  return gin.get_configurable(getattr(module, FUNCTIONS[program]))


def host(work, program, *gin_files, **macros):
  """Runs a program of T5X in this process; returns its result."""
  files = [f't5x/{RUN_FILES[program]}.gin', *gin_files]
  return parse(program, [work], files, bindings(macros))()


def ours(work, program, *gin_files, **macros):
  """Runs a program of ptune in this process, on one device."""
  files = [*gin_files, f'runs/{program}.gin']
  gin.clear_config()
  with tiny.one_device():
    status = cli.main(
      [
        program,
        f'--gin_search_paths={work}',
        *(f'--gin_file={file}' for file in files),
        *(f'--gin.{line.replace(" = ", "=", 1)}' for line in bindings(macros)),
      ]
    )
  assert not status


def logged(run, tag):
  """Returns the values of a tag that T5X logged, one per training step."""
  values = {}
  for file in (run / 'train').glob('events*'):
    for event in tf.compat.v1.train.summary_iterator(str(file)):
      for value in event.summary.value:
        if value.tag == tag:
          values[event.step] = tf.make_ndarray(value.tensor).item()
  return [values[step] for step in sorted(values)]


def saved(run, step, name='encoder.prompt.prompt.prompt'):
  """Returns the path that `save_adapter` wrote at a step."""
  return run / 'numpy_checkpoints' / f'checkpoint_{step}' / name


def assert_same(got, wanted):
  """Asserts that trained parameters agree to 1e-5, by path.

  One value in a thousand may differ. If a gradient is nearly 0, optimizers
  that divide by its size turn its rounding error into a step.
  """
  assert set(got) == set(wanted)
  apart = {path: np.abs(got[path] - x) for path, x in wanted.items()}
  beyond = np.concatenate([x.ravel() > 1e-5 for x in apart.values()])
  assert np.mean(beyond) < 1e-3, {k: np.max(x) for k, x in apart.items()}


# ------------------------------------------------------------------- training


@pytest.mark.parametrize('start', [0, START])
@pytest.mark.parametrize('optimizer', ['ptune', 't5x_adafactor'])
def test_ten_steps_equal_the_reference(numerics, base, work, start, optimizer):
  golden = load(numerics / 'trajectory' / 'trajectory.npz')
  features = {'inputs': 'encoder_input', 'targets': 'decoder_target'}
  five_batches = [
    {
      name: [token for token in golden[f'batches/{x}_tokens'][i, j] if token]
      for name, x in features.items()
    }
    for i in range(5)
    for j in range(4)
  ]
  if 'golden' not in seqio.TaskRegistry.names():
    add_task('golden', lambda split: five_batches, TOKENS, SEVERAL)
  np.save(work / 'initial.npy', golden['prompt_init'])
  # The weights are the same; a Hugging Face directory has no step.
  path = base if start else str(numerics / 'hf' / 't5_1_1')
  run = work / f'golden_{optimizer}_{start}'
  files = ['hosted.gin', 'prompts/from_file.gin', 'four_by_two.gin']
  files += ['steps.gin', *([f'{optimizer}.gin'] * (optimizer != 'ptune'))]
  last, state = host(
    work,
    'train',
    *files,
    MIXTURE_OR_TASK_NAME='golden',
    TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8},
    BATCH_SIZE=4,
    DROPOUT_RATE=0.0,
    LEARNING_RATE=0.01,
    PROMPT_LENGTH=5,
    PROMPT_FILE=str(work / 'initial.npy'),
    INITIAL_CHECKPOINT_PATH=path,
    MODEL_DIR=str(run),
    TRAIN_STEPS=start + 10,
    CHECKPOINT_PERIOD=1,
  )
  assert last == start + 10
  name = f'start{start}_lr0.01_'
  np.testing.assert_allclose(
    logged(run, 'loss'), golden[name + 'loss'], rtol=5e-6
  )
  for i, expected in enumerate(golden[name + 'prompt_each']):
    got = prompt_array.read(saved(run, start + i + 1))
    np.testing.assert_allclose(got, expected, atol=2e-5)
  if optimizer != 'ptune':
    v = state.param_states['encoder']['prompt']['prompt']['prompt'].v
    # A gradient is exact to 2e-5 of its maximum.
    root = np.sqrt(golden[name + 'v_each'][-1])
    np.testing.assert_allclose(np.sqrt(v), root, atol=2e-5 * root.max())
  after = parameters.flatten(state.params.unfreeze())
  assert after.pop(prompt.PATH) is not None
  before = open_checkpoint(path).leaves
  assert set(after) == set(before)
  for path, x in after.items():
    np.testing.assert_array_equal(x, before[path].read(), err_msg=path)


def macros_of(file, work):
  """Returns the macros that a file of gin/methods/ or gin/prompts/ needs."""
  text = (ROOT / 'gin' / f'{file}.gin').read_text()
  kind, name = file.split('/')
  macros = {}
  if kind == 'prompts' or 'PROMPT_LENGTH' in text:
    macros['PROMPT_LENGTH'] = 5
  if name == 'multitask':  # Any token may be a task token.
    macros |= {
      'multitask.multitask.vocab_size': 128,
      'multitask.multitask.tasks': 126,
    }
  if name == 'superpos':
    macros |= {'superpos.superpos.population': 128}
  if name == 'smop':  # T5X uses other keys for noise.
    macros |= {'smop.smop.noise': 0.0}
  if kind == 'prompts':
    files = [str(work / f'{i}.npy') for i in range(2)]
    for i, path in enumerate(files):
      np.save(path, np.random.default_rng(i).normal(size=(5, 96)))
    macros |= {
      'from_class_labels': {'CLASS_LABELS': ['positive', 'negative']},
      'from_file': {'PROMPT_FILE': files[0]},
      'from_prompts': {'SOURCE_PROMPTS': files, 'SOURCE_WEIGHTS': [0.3, 0.7]},
      'from_string': {'INITIAL_TEXT': 'a good film'},
    }.get(name, {})
    macros['MIXTURE_OR_TASK_NAME'] = 'hosted_text'
  return macros


@pytest.fixture(scope='module')
def ten_steps(work, base):
  """Trains a gin file in both; returns (T5X's directory, ptune's, the base)."""

  @functools.cache
  def ten_steps(file):
    name = file.replace('/', '_')
    directories = work / f'{name}_hosted', work / f'{name}_ours'
    text = (ROOT / 'gin' / f'{file}.gin').read_text()
    rate = re.findall(r'^LEARNING_RATE = (.*)', text, re.M)
    on_text = file.startswith('prompts')
    source = 'ptune://tiny' if on_text else base
    macros = macros_of(file, work) | {
      'DROPOUT_RATE': 0.0,
      # An optimizer that divides by the gradient magnifies rounding errors.
      'LEARNING_RATE': min(0.001, *(float(x) / 10 for x in rate), 1),
      'BATCH_SIZE': 8,  # All rows, so their order has no effect.
      'INITIAL_CHECKPOINT_PATH': source,
      'CHECKPOINT_PERIOD': 10,
    }
    files = ['models/tiny.gin' if on_text else 'hosted.gin', f'{file}.gin']
    start = open_checkpoint(source).step or 0
    host(
      work,
      'train',
      *files,
      'four_by_two.gin',
      'steps.gin',
      MODEL_DIR=str(directories[0]),
      TRAIN_STEPS=start + 10,
      **macros,
    )
    ours(
      work,
      'train',
      *files,
      MODEL_DIR=str(directories[1]),
      TRAIN_STEPS=10,
      EVAL_SPLIT=None,
      **macros,
      **{'settings.Saving.log_period': 1},
    )
    return *directories, source

  return ten_steps


@pytest.mark.parametrize('file', FILES)
def test_ten_steps_end_as_under_ptune(ten_steps, file):
  hosted, ours, base = ten_steps(file)
  name = file.removeprefix('methods/') if base != 'ptune://tiny' else 'prompt'
  start = open_checkpoint(base).step or 0
  np.testing.assert_allclose(
    logged(hosted, 'loss_per_nonpadding_target_token'),
    [record['loss'] for record in tiny.records(ours)],
    rtol=1e-5,
  )
  first = open_checkpoint(hosted / f'checkpoint_{start}').leaves
  last = open_checkpoint(hosted / f'checkpoint_{start + 10}').leaves
  trained = open_checkpoint(ours).leaves
  assert trained
  for path, leaf in open_checkpoint(base).leaves.items():
    if path not in trained:
      np.testing.assert_array_equal(
        last[path].read(), leaf.read(), err_msg=path
      )
  wanted = {path: leaf.read() for path, leaf in trained.items()}
  assert_same({path: last[path].read() for path in wanted}, wanted)
  moved = {path: np.abs(x - first[path].read()) for path, x in wanted.items()}
  assert max(map(np.max, moved.values())) > 5e-4

  step = start + 10
  written = sorted(path.name for path in saved(hosted, step, '').glob('*'))
  prompts = ours / 'prompts'
  if file == 'methods/full':
    assert not written
  elif (prompts / 'step_10.npy').exists():
    assert written == ['encoder.prompt.prompt.prompt']
    tokens = {'population': 128} if name == 'superpos' else {}
    method = methods.functions()[name](length=5, **tokens)
    if method.fold:  # Networks magnify differences.
      table = last[parameters.EMBEDDING].read()
      values = method.fold(
        {path: last[path].read() for path in wanted}, lambda ids: table[[*ids]]
      )
    else:
      values = {prompt.PATH: np.load(prompts / 'step_10.npy')}
    assert_same({prompt.PATH: prompt_array.read(saved(hosted, step))}, values)
  else:
    assert written == ['adapter.json', 'adapter.safetensors']
    theirs, facts = open_trained(saved(hosted, step, 'adapter.safetensors'))
    own, own_facts = open_trained(prompts / 'step_10.safetensors')
    assert facts['method'] == own_facts['method']
    assert facts['settings'] == own_facts.get('settings', {})
    assert facts['step'] == step
    assert_same(
      *({k: v.read() for k, v in x.leaves.items()} for x in (theirs, own))
    )


def test_rows_of_no_task_make_the_loss_nan_and_train_nothing(base, work):
  """T5X does not call `Method.check`, so the network must signal the error."""
  run = work / 'no_task'
  host(
    work,
    'train',
    'hosted.gin',
    'methods/multitask.gin',
    'four_by_two.gin',
    'steps.gin',
    INITIAL_CHECKPOINT_PATH=base,
    MODEL_DIR=str(run),
    TRAIN_STEPS=START + 2,
    BATCH_SIZE=8,
    PROMPT_LENGTH=3,
    **{'multitask.multitask.vocab_size': 128, 'multitask.multitask.tasks': 2},
  )
  assert np.isnan(logged(run, 'loss')).all()
  first, last = (
    open_checkpoint(run / f'checkpoint_{step}').leaves
    for step in (START, START + 2)
  )
  for path, leaf in last.items():  # Except for weight decay.
    np.testing.assert_allclose(leaf.read(), first[path].read(), rtol=2.1e-5)


def test_what_is_not_finite_is_not_saved(tmp_path):
  params = {prompt.PATH: np.full((3, 4), np.nan), 'decoder/x': np.ones(2)}
  state = {
    'target': parameters.unflatten(jax.tree.map(jax.numpy.asarray, params)),
    'state': {'step': np.int32(7)},
  }
  with pytest.raises(ValueError, match=r'step 7 .*prompt/prompt.*not saved'):
    t5x_host.save_adapter(
      state, None, model_dir=str(tmp_path), method=METHODS['prompt']
    )
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('changes', 'offenders'),
  [
    (
      {'sizes.t5.mlp_dim': 32, 'sizes.t5.num_encoder_layers': 3},
      ['layers_2/mlp/wo/kernel', 'layers_0/mlp/wo/kernel: got'],
    ),
    ({'INITIAL_CHECKPOINT_PATH': None}, ['freezes the base model']),
    (
      {'models.EncoderDecoderModel.objective': 'any'},
      ['remove the file of losses/, or'],
    ),
  ],
)
def test_what_does_not_fit_is_refused(work, base, changes, offenders):
  macros = {
    'INITIAL_CHECKPOINT_PATH': base,
    'MODEL_DIR': str(work / 'refused'),
    'TRAIN_STEPS': START + 1,
    'BATCH_SIZE': 8,
    **changes,
  }
  files = ['hosted.gin', 'methods/prompt.gin', 'steps.gin']
  with pytest.raises(ValueError) as error:
    host(work, 'train', *files, **macros)
  for line in offenders:
    assert line in str(error.value)
  assert not list((work / 'refused').glob('*checkpoint*'))


# ---------------------------------------------------------- eval and infer


def predictions(directory):
  """Returns the token ids and scores that T5X's or ptune's infer wrote."""
  (file,) = (
    file
    for file in directory.glob('hosted_tokens*')
    if file.is_file() and not file.name.endswith('.COMPLETED')
  )
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  return (
    [until_eos(line['prediction']) for line in lines],
    [line.get('score', line.get('aux', {}).get('scores')) for line in lines],
  )


def both(work, program, name, file, hosted, own, **macros):
  """Runs eval or infer in T5X and in ptune, with macros for each.

  Returns:
    Both output directories.
  """
  directories = [work / f'{program}_{name}_{host}' for host in ('t5x', 'ptune')]
  files = ['hosted.gin', f'{file}.gin']
  macros = macros_of(file, work) | macros
  output = f'{program.upper()}_OUTPUT_DIR'
  of_t5x = ['four_by_two.gin', *(['scored.gin'] * (program == 'infer'))]
  hosted, own = (
    x | {output: str(directory)}
    for x, directory in zip((hosted, own), directories, strict=True)
  )
  host(work, program, *files, *of_t5x, **macros, **hosted)
  ours(work, program, *files, **macros, **own)
  return directories


@pytest.mark.parametrize('num_beams', [1, 4])
@pytest.mark.parametrize('name', DECODED)
def test_infer_equals_ptune(work, base, ten_steps, name, num_beams):
  """T5X reads its checkpoint; ptune reads the file beside it as PROMPT_FILE."""
  file = f'methods/{name}'
  run, _, _ = ten_steps(file)
  (trained,) = saved(run, START + 10, '').glob('*[!n]')  # Not .json.
  got, expected = map(
    predictions,
    both(
      work,
      'infer',
      f'{name}_{num_beams}',
      file,
      {'CHECKPOINT_PATH': str(run / f'checkpoint_{START + 10}')},
      {'CHECKPOINT_PATH': base, 'PROMPT_FILE': str(trained)},
      **{'models.Decoding.num_beams': num_beams},
    ),
  )
  assert got[0] == expected[0]
  np.testing.assert_allclose(got[1], expected[1], atol=1e-4)


@pytest.mark.parametrize(
  ('name', 'ending'), [('prompt', 'npy'), ('lora', 'safetensors')]
)
def test_infer_of_what_ptune_trained(work, base, numerics, name, ending):
  """T5X reads PROMPT_FILE, and the base model in Hugging Face's format."""
  file = f'methods/{name}'
  run = work / f'{name}_far'
  ours(
    work,
    'train',
    'hosted.gin',
    f'{file}.gin',
    MODEL_DIR=str(run),
    INITIAL_CHECKPOINT_PATH=base,
    TRAIN_STEPS=4,
    EVAL_SPLIT=None,
    BATCH_SIZE=8,
    **macros_of(file, work),
    LEARNING_RATE=0.1,  # Enough to change answers.
  )
  trained = str(run / 'prompts' / f'step_4.{ending}')
  (got, scores), (expected, expected_scores) = map(
    predictions,
    both(
      work,
      'infer',
      f'{name}_far',
      file,
      {
        'CHECKPOINT_PATH': str(numerics / 'hf' / 't5_1_1'),
        'PROMPT_FILE': trained,
      },
      {'MODEL_DIR': str(run)},
    ),
  )
  assert got == expected
  np.testing.assert_allclose(scores, expected_scores, atol=1e-4)
  ours(
    work,
    'infer',
    'hosted.gin',
    'methods/full.gin',
    CHECKPOINT_PATH=base,
    INFER_OUTPUT_DIR=str(work / f'{name}_without'),
  )
  assert predictions(work / f'{name}_without')[0] != expected


@pytest.mark.parametrize('num_beams', [1, 4])
def test_eval_equals_ptune(work, base, ten_steps, num_beams):
  """T5X reads its checkpoint (greedy), or the base and PROMPT_FILE (beams)."""
  run, _, _ = ten_steps('methods/prompt')
  own = {
    'CHECKPOINT_PATH': base,
    'PROMPT_FILE': str(saved(run, START + 10)),
  }
  theirs = {'CHECKPOINT_PATH': str(run / f'checkpoint_{START + 10}')}
  hosted, ours = both(
    work,
    'eval',
    str(num_beams),
    'methods/prompt',
    theirs if num_beams == 1 else own,
    own | {'EVAL_SPLIT': 'test'},
    **{'models.Decoding.num_beams': num_beams},
  )
  metrics = hosted / 'inference_eval' / 'hosted_tokens-metrics.jsonl'
  (got,), (expected,) = (
    [json.loads(line) for line in file.read_text().splitlines()]
    for file in (metrics, ours / 'metrics.jsonl')
  )
  assert got['step'] == (START + 10 if num_beams == 1 else START)
  assert got['mean_token'] == pytest.approx(expected['mean_token'], abs=1e-6)
  assert got['mean_score'] == pytest.approx(expected['mean_score'], abs=1e-4)


# -------------------------------------------------------------- command lines


def main():
  """Runs a T5X program in a process that `tiny` has forked."""
  warnings.simplefilter('ignore')
  program, *sys.argv[1:] = sys.argv[1:]
  runpy.run_module(program, run_name='__main__', alter_sys=True)
  return 0


def wait_for(process, text='', path=None):
  """Waits until a process has written a text or a file."""
  deadline = time.monotonic() + 300
  while not (path.exists() if path else text in process.output):
    assert time.monotonic() < deadline, process.output[-5000:]
    time.sleep(0.01)


@pytest.mark.parametrize('use_orbax', [True, False])
def test_killed_and_resumed_a_run_ends_as_under_ptune(
  work, base, ten_steps, use_orbax
):
  run = work / f'killed_{use_orbax}'
  _, expected, _ = ten_steps('methods/prompt')
  macros = {
    'MODEL_DIR': str(run),
    'INITIAL_CHECKPOINT_PATH': base,
    'TRAIN_STEPS': START + 10,
    'EVAL_PERIOD': 2,
    'EVAL_STEPS': 1,
    'CHECKPOINT_PERIOD': 2,
    'BATCH_SIZE': 8,
    'PROMPT_LENGTH': 5,
    'DROPOUT_RATE': 0.0,
    'LEARNING_RATE': 0.001,
    'train.use_orbax': use_orbax,
    'train/utils.DatasetConfig.shuffle': False,
  }
  args = [
    't5x.train',
    f'--gin_search_paths={work},{ROOT / "gin"}',
    '--gin_file=hosted.gin',
    '--gin_file=methods/prompt.gin',
    '--gin_file=t5x/finetune.gin',
    *(f'--gin.{line.replace(" = ", "=", 1)}' for line in bindings(macros)),
  ]
  start = functools.partial(
    tiny.Command, args, call='tests.t5x_host_test:main', XLA_FLAGS=QUICK_FLAGS
  )
  process = start()
  wait_for(process, path=run / f'checkpoint_{START + 4}')
  process.send(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  assert not (run / f'checkpoint_{START + 10}').exists()
  again = start()
  assert again.wait() == 0, again.output[-5000:]
  (resumed,) = re.findall(r'Starting main loop over steps (\d+)', again.output)
  assert START + 4 <= int(resumed) < START + 10
  source = open_checkpoint(run / f'checkpoint_{START + 10}')
  assert source.kind == ('t5x_orbax' if use_orbax else 't5x')
  assert_same(
    {prompt.PATH: source.leaves[prompt.PATH].read()},
    {prompt.PATH: np.load(expected / 'prompts' / 'step_10.npy')},
  )
  for path, leaf in open_checkpoint(base).leaves.items():
    np.testing.assert_array_equal(
      source.leaves[path].read(), leaf.read(), err_msg=path
    )
  # The optimizer has state only for the prompt.
  assert all('prompt' in k or k.endswith('count') for k in source.ignored)
  for step in range(START, START + 11, 2):
    one = open_checkpoint(run / f'checkpoint_{step}')
    np.testing.assert_array_equal(
      prompt_array.read(saved(run, step)), one.leaves[prompt.PATH].read()
    )


def test_the_command_in_readme_runs(place):
  line = t5x_contract_test.command()
  smaller = '--gin.BATCH_SIZE=8 --gin.PROMPT_LENGTH=9'
  smaller += ' --gin.EVALUATOR_NUM_EXAMPLES=8 --gin.EVAL_STEPS=1'
  (place / 'models').rmdir()  # gin would treat it as a package.
  path = [str(place), os.environ.get('PYTHONPATH', ''), str(ROOT)]
  done = subprocess.run(
    ['bash', '-c', readme_test.rewritten(f'{line} {smaller}', place)],
    cwd=place,
    env=tiny.environment()
    | {
      'PATH': f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}',
      'PYTHONPATH': ':'.join(path),
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  assert not done.returncode, done.stdout[-5000:]
  first, last = (
    prompt_array.read(saved(place / 'runs' / 'sst2', step)) for step in (0, 3)
  )
  assert first.shape == last.shape == (9, 96)
  assert 0.1 < np.abs(last - first).max() < 10


def test_every_file_is_read_by_the_programs_of_t5x():
  """Files of models/, methods/ and prompts/ work before and after t5x/'s."""
  models = sorted(path.stem for path in (ROOT / 'gin' / 'models').iterdir())
  paths = {
    'train': ['MODEL_DIR', 'INITIAL_CHECKPOINT_PATH'],
    'eval': ['CHECKPOINT_PATH', 'EVAL_OUTPUT_DIR'],
    'infer': ['CHECKPOINT_PATH', 'INFER_OUTPUT_DIR'],
  }
  choices = [
    *([f'models/{name}.gin', 'methods/prompt.gin'] for name in models),
    *(['models/tiny.gin', f'{file}.gin'] for file in FILES),
  ]
  for program, files in itertools.product(paths, choices):
    text = ''.join((ROOT / 'gin' / file).read_text() for file in files)
    # Macros that a user must set, such as CLASS_LABELS.
    asked = set(re.findall(r'%([A-Z_]+)', text))
    asked -= set(re.findall(r'^([A-Z_]+) =', text, re.M))
    given = bindings({'TRAIN_STEPS': 10} if program == 'train' else {})
    given += [f"{path} = '/there'" for path in paths[program]]
    given += [f'{macro} = None' for macro in sorted(asked)]
    run = f't5x/{RUN_FILES[program]}.gin'
    for order in (1, -1):
      parse(program, [], [*files, run][::order], given)
      for macro in ('MODEL', 'METHOD'):
        reference = gin.query_parameter(f'%{macro}')
        assert reference.evaluate, (files, macro)
