"""Runs ptune's modules in T5X; skipped where T5X is not installed.

T5X must be installed from source. `t5x_contract_test` tests what can be tested
without it.
"""

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import pytest

from ptune import models, network, optim, parameters, prompt_init, sizes
from ptune.convert import open_checkpoint
from ptune.methods import prompt
from tests.network_test import TINY, load
from tests.t5x_contract_test import METHODS, ROOT

with warnings.catch_warnings():
  warnings.simplefilter('ignore')
  try:
    from ptune import t5x_host
  except ImportError as error:
    pytest.skip(f'T5X cannot be imported: {error}', allow_module_level=True)
  from t5x import adafactor, partitioning, trainer

# T5X's own code warns.
pytestmark = pytest.mark.filterwarnings('ignore')

START = 1_100_000
TASK = """
import numpy as np
import seqio
import tensorflow as tf

ROWS = {'train': 8, 'validation': 8, 'test': 5}


def rows(split):
  draw = np.random.default_rng(len(split))
  return [
    {
      'inputs': draw.integers(3, 128, draw.integers(2, 15)).tolist(),
      'targets': draw.integers(3, 128, draw.integers(1, 6)).tolist(),
    }
    for _ in range(ROWS[split])
  ]


def source(split, shuffle_files, seed=None):
  spec = tf.TensorSpec([None], tf.int32)
  return tf.data.Dataset.from_generator(
    lambda: rows(split),
    output_signature={'inputs': spec, 'targets': spec},
  )


def mean_token(targets, predictions):
  return {'mean_token': float(np.mean([np.mean(p) for p in predictions]))}


feature = seqio.Feature(seqio.PassThroughVocabulary(128, eos_id=1))
seqio.TaskRegistry.add(
  'hosted',
  source=seqio.FunctionDataSource(
    source, splits=list(ROWS), num_input_examples=ROWS
  ),
  preprocessors=[seqio.preprocessors.append_eos_after_trim],
  output_features={'inputs': feature, 'targets': feature},
  metric_fns=[mean_token],
)
"""
GIN = """\
from __gin__ import dynamic_registration
from ptune import network
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
LENGTHS = {'inputs': 16, 'targets': 8}


@pytest.fixture(scope='module', autouse=True)
def t5x_promotes_ranks():
  jax.config.update('jax_numpy_rank_promotion', 'allow')
  yield
  jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='module')
def work(tmp_path_factory):
  """A directory with the task and the model's gin file, on the path."""
  directory = tmp_path_factory.mktemp('t5x')
  (directory / 'hosted_task.py').write_text(TASK)
  (directory / 'hosted.gin').write_text(GIN)
  sys.path.append(str(directory))
  yield directory
  sys.path.remove(str(directory))


@pytest.fixture(scope='module')
def base(numerics):
  """The base model in T5X's older layout, of step 1,100,000."""
  return str(numerics / 'checkpoints' / 'legacy_base' / f'checkpoint_{START}')


class Hosted:
  """A model of ptune in T5X's trainer, on eight devices: 2 data, 4 model."""

  def __init__(self, method, path, shapes, make_optimizer):
    self.partitioner = partitioning.PjitPartitioner(
      model_parallel_submesh=(1, 1, 1, 4),
      logical_axis_rules=partitioning.standard_logical_axis_rules(
        additional_rules=t5x_host.logical_axis_rules()
      ),
    )
    assert dict(self.partitioner.mesh.shape) == {'data': 2, 'model': 4}
    optimizer = make_optimizer(method, path)
    self.model = t5x_host.Model(
      TINY, method, 'hosted', 'hosted_task', optimizer_def=optimizer
    )
    initializer = t5x_host.Initializer(
      optimizer,
      self.model.get_initial_variables,
      shapes,
      self.partitioner,
      initial_checkpoint_path=path,
      task_feature_lengths=LENGTHS,
    )
    self.trainer = trainer.Trainer(
      self.model,
      initializer.from_scratch(jax.random.key(0)),
      self.partitioner,
      [],
      None,
      initializer.train_state_axes,
      jax.random.PRNGKey(0),
      learning_rate_fn=lambda step: 0.01,
      num_microbatches=None,
    )

  def params(self):
    tree = self.trainer.train_state.params.unfreeze()
    return parameters.flatten(jax.tree.map(np.asarray, tree))

  def step(self, batch):
    metrics = self.trainer.train(iter([batch]), 1).result()
    return float(metrics['loss'].value)


def ptune_adafactor(method, path):
  make = functools.partial(optim.adafactor, learning_rate=0.01)
  return t5x_host.optimizer(make, method=method, initial_checkpoint_path=path)


def t5x_adafactor(method, path):
  del path
  return t5x_host.Trained(
    adafactor.Adafactor(
      decay_rate=0.8,
      weight_decay_rate=1e-5,
      multiply_by_parameter_scale=False,
      logical_factor_rules=t5x_host.factor_rules(),
    ),
    method,
  )


@pytest.mark.parametrize('start', [0, START])
@pytest.mark.parametrize('make', [ptune_adafactor, t5x_adafactor])
def test_ten_steps_equal_the_reference(numerics, base, work, start, make):
  golden = load(numerics / 'trajectory' / 'trajectory.npz')
  batches = {
    k.removeprefix('batches/'): v
    for k, v in golden.items()
    if k.startswith('batches/')
  }
  method = prompt.prompt(5, prompt_init.from_array(golden['prompt_init']))
  # The same weights; a Hugging Face directory knows of no step.
  path = base if start else str(numerics / 'hf' / 't5_1_1')
  shapes = {k: v.shape[1:] for k, v in batches.items()}
  hosted = Hosted(method, path, shapes, make)
  before = hosted.params()
  name = f'start{start}_lr0.01_'
  for i in range(10):
    loss = hosted.step({k: v[i % 5] for k, v in batches.items()})
    np.testing.assert_allclose(loss, golden[name + 'loss'][i], rtol=5e-6)
    np.testing.assert_allclose(
      hosted.params()[prompt.PATH], golden[name + 'prompt_each'][i], atol=2e-5
    )
    if make is t5x_adafactor:
      states = hosted.trainer.train_state.param_states
      v = states['encoder']['prompt']['prompt']['prompt'].v
      # A gradient is known to 2e-5 of its maximum.
      root = np.sqrt(golden[name + 'v_each'][i])
      np.testing.assert_allclose(np.sqrt(v), root, atol=2e-5 * root.max())
  after = hosted.params()
  changed = [k for k in before if not np.array_equal(before[k], after[k])]
  assert changed == [prompt.PATH]
  assert int(hosted.trainer.train_state.step) == start + 10


@METHODS
def test_every_method_trains_and_predicts_as_under_ptune(method, base, work):
  rng = np.random.default_rng(0)
  batch = {
    'encoder_input_tokens': rng.integers(2, 128, (4, 12)),
    'decoder_target_tokens': rng.integers(2, 128, (4, 6)),
    'decoder_loss_weights': np.ones((4, 6)),
  }
  batch['encoder_input_tokens'][1, 7:] = 0
  batch['decoder_input_tokens'] = np.pad(
    batch['decoder_target_tokens'], ((0, 0), (1, 0))
  )[:, :-1]
  batch = {k: v.astype(np.int32) for k, v in batch.items()}
  shapes = {k: v.shape for k, v in batch.items()}
  hosted = Hosted(method, base, shapes, ptune_adafactor)
  before = hosted.params()
  loss = hosted.step(batch)
  after = hosted.params()
  for path in before:
    same = np.array_equal(before[path], after[path])
    assert same != method.trains(path), path

  ours = models.EncoderDecoderModel(
    network.Transformer(TINY, method.placements)
  )
  expected, _ = jax.jit(ours.loss)(parameters.unflatten(before), batch)
  np.testing.assert_allclose(loss, expected, rtol=5e-6)

  params = parameters.unflatten(after)
  score = jax.jit(hosted.model.score_batch)(params, batch)
  np.testing.assert_allclose(
    score, jax.jit(ours.score)(params, batch), rtol=1e-6, atol=1e-4
  )
  for how in (models.Decoding(), models.Decoding(num_beams=3, alpha=0.8)):
    theirs = t5x_host.Model(TINY, method, 'hosted', decoding=how)
    tokens, aux = jax.jit(theirs.predict_batch_with_aux)(params, batch)
    our_tokens, our_scores = jax.jit(
      functools.partial(ours.predict, max_decode_length=6, how=how)
    )(params, batch['encoder_input_tokens'])
    np.testing.assert_array_equal(tokens, our_tokens)
    np.testing.assert_allclose(aux['scores'], our_scores, atol=1e-4)


def test_a_base_that_does_not_fit_is_refused_with_all_offenders(base, work):
  method = prompt.prompt(5)
  other = sizes.t5(
    **{f: getattr(TINY, f) for f in TINY.__dataclass_fields__}
    | {'mlp_dim': 32, 'num_encoder_layers': 3}
  )
  optimizer = ptune_adafactor(method, base)
  model = t5x_host.Model(
    other, method, 'hosted', 'hosted_task', optimizer_def=optimizer
  )
  initializer = t5x_host.Initializer(
    optimizer,
    model.get_initial_variables,
    {'encoder_input_tokens': (1, 4), 'decoder_input_tokens': (1, 4)},
    partitioning.PjitPartitioner(
      model_parallel_submesh=(1, 1, 1, 4),
      logical_axis_rules=partitioning.standard_logical_axis_rules(
        additional_rules=t5x_host.logical_axis_rules()
      ),
    ),
    initial_checkpoint_path=base,
    task_feature_lengths=LENGTHS,
  )
  with pytest.raises(ValueError) as error:
    initializer.from_scratch(jax.random.key(0))
  for line in ('layers_2/mlp/wo/kernel', 'layers_0/mlp/wo/kernel: got'):
    assert line in str(error.value)


# -------------------------------------------------------------- command lines


def command(work, program, *gin_files, **macros):
  """A command line of T5X, or of ptune, as users type it."""
  if program == 'ptune':
    start = ['-c', 'import sys; from ptune.cli import main; sys.exit(main())']
    start += ['train', f'--gin_search_paths={work}']
  else:
    start = ['-m', f't5x.{program}']
    start += [f'--gin_search_paths={work},{ROOT / "gin"}']
  macros = {
    'MIXTURE_OR_TASK_NAME': 'hosted',
    'MIXTURE_OR_TASK_MODULE': 'hosted_task',
    'TASK_FEATURE_LENGTHS': LENGTHS,
    'PROMPT_LENGTH': 5,
    **macros,
  }
  return [
    sys.executable,
    '-W',
    'ignore',
    *start,
    *(f'--gin_file={file}' for file in ('hosted.gin', *gin_files)),
    *(f'--gin.{name}={value!r}' for name, value in macros.items()),
  ]


def environment(work):
  path = os.pathsep.join([str(work), *filter(None, sys.path)])
  return {**os.environ, 'PYTHONPATH': path, 'XLA_FLAGS': ''}


def run(work, *args, **macros):
  result = subprocess.run(
    command(work, *args, **macros),
    env=environment(work),
    cwd=work,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 0, result.stderr[-5000:]


TRAIN = {
  'DROPOUT_RATE': 0.0,
  'LEARNING_RATE': 0.01,
  'BATCH_SIZE': 8,  # All rows, so that their order makes no difference.
  'CHECKPOINT_PERIOD': 2,
}


@pytest.fixture(scope='module')
def ours(work, base):
  """The prompt after ten steps of `ptune train`."""
  run(
    work,
    'ptune',
    'prompts/random_uniform.gin',
    'runs/train.gin',
    MODEL_DIR=str(work / 'ours'),
    INITIAL_CHECKPOINT_PATH=base,
    TRAIN_STEPS=10,
    EVAL_SPLIT=None,
    **TRAIN,
  )
  return np.load(work / 'ours' / 'prompts' / 'step_10.npy')


def train_and_kill(work, base, name, use_orbax):
  """Trains for ten steps under T5X, killed by SIGKILL on the way."""
  args = command(
    work,
    'train',
    'prompts/random_uniform.gin',
    't5x/finetune.gin',
    MODEL_DIR=str(work / name),
    INITIAL_CHECKPOINT_PATH=base,
    TRAIN_STEPS=START + 10,
    EVAL_PERIOD=2,
    EVAL_STEPS=1,
    **TRAIN,
    **{'train.use_orbax': use_orbax},
  )
  # SeqIO shuffles across epochs; unshuffled, each batch is one epoch.
  args.append('--gin.train/utils.DatasetConfig.shuffle=False')
  log = work / f'{name}.log'
  with log.open('w') as out:
    process = subprocess.Popen(
      args, env=environment(work), cwd=work, stdout=out, stderr=out
    )
    deadline = time.monotonic() + 300
    while not (work / name / f'checkpoint_{START + 4}').is_dir():
      assert time.monotonic() < deadline
      assert process.poll() is None, log.read_text()[-5000:]
      time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert not (work / name / f'checkpoint_{START + 10}').exists()
  with log.open('w') as out:
    done = subprocess.run(
      args, env=environment(work), cwd=work, stdout=out, stderr=out, timeout=300
    )
  assert done.returncode == 0, log.read_text()[-5000:]
  return work / name


def saved_prompt(run_directory, step):
  name = 'encoder.prompt.prompt.prompt'
  return run_directory / 'numpy_checkpoints' / f'checkpoint_{step}' / name


@pytest.fixture(scope='module')
def trained(work, base):
  return train_and_kill(work, base, 'orbax', True)


@pytest.mark.parametrize('use_orbax', [True, False])
def test_killed_and_resumed_a_run_ends_as_under_ptune(
  work, base, ours, trained, use_orbax
):
  directory = trained
  if not use_orbax:
    directory = train_and_kill(work, base, 'legacy', False)
  source = open_checkpoint(directory / f'checkpoint_{START + 10}')
  assert source.kind == ('t5x_orbax' if use_orbax else 't5x')
  got = source.leaves[prompt.PATH].read()
  np.testing.assert_allclose(got, ours, atol=1e-5)
  for path, leaf in open_checkpoint(base).leaves.items():
    np.testing.assert_array_equal(
      source.leaves[path].read(), leaf.read(), err_msg=path
    )
  # The optimizer's state is the prompt's alone.
  assert all('prompt' in k or k.endswith('count') for k in source.ignored)
  for step in range(START, START + 11, 2):
    one = open_checkpoint(directory / f'checkpoint_{step}')
    np.testing.assert_array_equal(
      prompt_init.read(saved_prompt(directory, step)),
      one.leaves[prompt.PATH].read(),
    )


def test_eval_and_infer_equal_ptune(work, base, trained, numerics):
  rows = importlib.import_module('hosted_task').rows
  checkpoint = trained / f'checkpoint_{START + 10}'
  params = parameters.unflatten(
    {k: v.read() for k, v in open_checkpoint(checkpoint).leaves.items()}
  )
  method = prompt.prompt(5)
  model = models.EncoderDecoderModel(
    network.Transformer(TINY, method.placements)
  )

  def predict(split, how):
    inputs = np.zeros((len(rows(split)), LENGTHS['inputs']), np.int32)
    for i, row in enumerate(rows(split)):
      line = [*row['inputs'], 1]
      inputs[i, : len(line)] = line
    tokens, scores = model.predict(params, inputs, LENGTHS['targets'], how)
    return np.asarray(tokens), np.asarray(scores)

  # A checkpoint of T5X holds the base and the prompt.
  run(
    work,
    'eval',
    'methods/prompt.gin',
    't5x/eval.gin',
    CHECKPOINT_PATH=str(checkpoint),
    EVAL_OUTPUT_DIR=str(work / 'evaluated'),
    **{'utils.DatasetConfig.split': 'validation'},
  )
  tokens, _ = predict('validation', models.Decoding())
  metrics = work / 'evaluated' / 'inference_eval' / 'hosted-metrics.jsonl'
  record = json.loads(metrics.read_text().splitlines()[-1])
  assert record['step'] == START + 10
  expected = np.mean([np.mean(_until_eos(row)) for row in tokens])
  assert record['mean_token'] == pytest.approx(expected, abs=1e-6)

  # The same, as a Hugging Face base and the prompt's file; beam search.
  run(
    work,
    'infer',
    'methods/prompt.gin',
    't5x/infer.gin',
    CHECKPOINT_PATH=str(numerics / 'hf' / 't5_1_1'),
    PROMPT_FILE=str(saved_prompt(trained, START + 10)),
    INFER_OUTPUT_DIR=str(work / 'inferred'),
    **{'models.Decoding.num_beams': 4, 'infer.mode': 'predict_with_aux'},
  )
  tokens, scores = predict('test', models.Decoding(num_beams=4))
  (file,) = (work / 'inferred').glob(
    'hosted-predict_with_aux.jsonl-?????-of-*1'
  )
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  assert [_until_eos(line['prediction']) for line in lines] == [
    _until_eos(row) for row in tokens
  ]
  np.testing.assert_allclose(
    [line['aux']['scores'] for line in lines], scores, atol=1e-4
  )


def _until_eos(row):
  """What a prediction says: [5, 9, 1, 0] -> [5, 9, 1]."""
  row = [int(token) for token in row]
  return row[: row.index(1) + 1] if 1 in row else row
