"""Runs ptune's modules in T5X; skipped where T5X is not installed.

T5X must be installed from source. `t5x_contract_test` tests what can be tested
without it. What is tested with which methods:

    ten steps of t5x.train on 4 x 2 devices end as `ptune train` does, and the
      base stays as it is: every file of gin/methods/
    loss, score, greedy and beam search, on 2 x 4 devices: DECODED
    ten steps equal T5X's own, optimizer state included; killed and resumed in
      both checkpoint formats; t5x.eval; t5x.infer of a .npy: prompt
    t5x.infer of a .safetensors: lora
"""

import functools
import importlib
import json
import os
import re
import runpy
import signal
import sys
import time
import warnings

import jax
import numpy as np
import pytest

from ptune import models, network, optim, parameters, prompt_init, sizes
from ptune.convert import open_checkpoint
from ptune.convert.trained import open_trained
from ptune.methods import lora, multitask, prompt
from tests import tiny
from tests.methods_test import METHODS
from tests.network_test import TINY, load
from tests.t5x_contract_test import DECODED, ROOT

with warnings.catch_warnings():
  warnings.simplefilter('ignore')
  try:
    from ptune import t5x_host
  except ImportError as error:
    pytest.skip(f'T5X cannot be imported: {error}', allow_module_level=True)
  from t5x import adafactor, partitioning, trainer
  from t5x import models as t5x_models

# T5X's own code warns.
pytestmark = pytest.mark.filterwarnings('ignore')

FILES = sorted(path.stem for path in (ROOT / 'gin' / 'methods').iterdir())

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
from ptune import sizes
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


@pytest.mark.parametrize('name', DECODED)
def test_a_method_trains_and_predicts_as_under_ptune(name, base, work):
  method = METHODS[name]
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


def test_other_losses_are_refused(work):
  loss = functools.partial(models.EncoderDecoderModel, objective=print)
  with pytest.raises(ValueError, match=r'leave the file of losses/ out'):
    t5x_host.Model(TINY, METHODS['prompt'], 'hosted', 'hosted_task', loss=loss)


def test_rows_of_no_task_make_the_loss_nan_and_train_nothing(base, work):
  """T5X does not call `Method.check`."""
  method = multitask.multitask(3, tasks=2, vocab_size=128)
  tokens = np.full((4, 6), 9, np.int32)  # Of the tasks: 127 and 126.
  batch = dict.fromkeys(
    (
      'encoder_input_tokens',
      'decoder_input_tokens',
      'decoder_target_tokens',
      'decoder_loss_weights',
    ),
    tokens,
  )
  hosted = Hosted(
    method, base, {k: v.shape for k, v in batch.items()}, ptune_adafactor
  )
  assert np.isnan(hosted.step(batch))
  assert all(np.isfinite(x).all() for x in hosted.params().values())


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


def main():
  """Runs a program in a process that `tiny` has forked."""
  sys.path.append(os.environ['HOSTED'])
  warnings.simplefilter('ignore')
  program, *sys.argv[1:] = sys.argv[1:]
  if program == 'ptune':
    from ptune.cli import main

    return main()
  return runpy.run_module(program, run_name='__main__', alter_sys=True) and 0


def parse_all():
  """Reads every file of gin/models and gin/methods with those of gin/t5x."""
  from t5x import gin_utils

  import gin

  search = [os.environ['HOSTED'], str(ROOT / 'gin'), '']
  search.append(os.path.dirname(os.path.dirname(t5x_models.__file__)))
  runs = {
    'train': ['finetune', 'MODEL_DIR', 'INITIAL_CHECKPOINT_PATH'],
    'eval': ['eval', 'CHECKPOINT_PATH', 'EVAL_OUTPUT_DIR'],
    'infer': ['infer', 'CHECKPOINT_PATH', 'INFER_OUTPUT_DIR'],
  }
  common = ["MIXTURE_OR_TASK_NAME = 'hosted'", 'TASK_FEATURE_LENGTHS = {}']
  all_models = sorted(path.stem for path in (ROOT / 'gin/models').iterdir())
  prompts = sorted(path.stem for path in (ROOT / 'gin/prompts').iterdir())
  for program, (run_file, *paths) in runs.items():
    bindings = [*common, *(f"{path} = '/there'" for path in paths)]
    if program == 'train':
      bindings.append('TRAIN_STEPS = 10')
    # The file of T5X that is included calls it __main__.
    sys.modules['__main__'] = importlib.import_module(f't5x.{program}')
    for files in [
      *([f'models/{name}.gin', 'methods/prompt.gin'] for name in all_models),
      *(['models/tiny.gin', f'methods/{name}.gin'] for name in FILES),
      *(['models/tiny.gin', f'prompts/{name}.gin'] for name in prompts),
    ]:
      text = ''.join((ROOT / 'gin' / file).read_text() for file in files)
      # Those that a user has to set, such as CLASS_LABELS.
      asked = set(re.findall(r'%([A-Z_]+)', text))
      asked -= set(re.findall(r'^([A-Z_]+) =', text, re.M))
      given = [f'{macro} = None' for macro in sorted(asked)]
      for order in (1, -1):
        gin.clear_config()
        run = f't5x/{run_file}.gin'
        gin_utils.parse_gin_flags(
          search, [*files, run][::order], given + bindings
        )
        for macro in ('MODEL', 'METHOD'):
          reference = gin.query_parameter(f'%{macro}')
          assert reference.evaluate, (files, macro)
  print('parsed')
  return 0


def command(program, *gin_files, **macros):
  """A command line of T5X, or of ptune, as users type it."""
  work = macros.pop('work')
  search = f'{work},{ROOT / "gin"}'
  if program.startswith('ptune'):
    start = [*program.split(), f'--gin_search_paths={work}']
  else:
    start = [program, f'--gin_search_paths={search}']
  macros = {
    'MIXTURE_OR_TASK_NAME': 'hosted',
    'MIXTURE_OR_TASK_MODULE': 'hosted_task',
    'TASK_FEATURE_LENGTHS': LENGTHS,
    **macros,
  }
  return [
    *start,
    *(f'--gin_file={file}' for file in ('hosted.gin', *gin_files)),
    *(f'--gin.{name}={value!r}' for name, value in macros.items()),
  ]


def start(work, args, devices=1):
  flag = f'--xla_force_host_platform_device_count={devices}'
  return tiny.Command(
    args,
    call='tests.t5x_host_test:main',
    HOSTED=str(work),
    XLA_FLAGS=flag,
  )


def run(work, *args, devices=1, **macros):
  process = start(work, command(*args, work=work, **macros), devices)
  assert process.wait() == 0, process.output[-5000:]


def test_every_file_is_read_by_the_programs_of_t5x(work):
  process = tiny.Command(
    [], call='tests.t5x_host_test:parse_all', HOSTED=str(work)
  )
  assert process.wait() == 0, process.output[-5000:]
  assert 'parsed' in process.output


TRAIN = {
  'DROPOUT_RATE': 0.0,
  'LEARNING_RATE': 0.01,
  'BATCH_SIZE': 8,  # All rows, so that their order makes no difference.
  'CHECKPOINT_PERIOD': 2,
}


FOUR_BY_TWO = {  # 4 data, 2 model.
  'partitioning.PjitPartitioner.num_partitions': None,
  'partitioning.PjitPartitioner.model_parallel_submesh': (1, 1, 1, 2),
}
# SeqIO shuffles across epochs; unshuffled, each batch is one epoch.
UNSHUFFLED = {'train/utils.DatasetConfig.shuffle': False}


@pytest.mark.parametrize('file', FILES)
def test_ten_steps_of_a_method_end_as_under_ptune(work, base, file):
  text = (ROOT / 'gin' / 'methods' / f'{file}.gin').read_text()
  (rate,) = re.findall(r'^LEARNING_RATE = (.*)', text, re.M)
  macros = {
    **TRAIN,
    'INITIAL_CHECKPOINT_PATH': base,
    'CHECKPOINT_PERIOD': 10,
    'LEARNING_RATE': min(float(rate), TRAIN['LEARNING_RATE']),
  }
  if 'PROMPT_LENGTH' in text:
    macros['PROMPT_LENGTH'] = 5
  if file == 'multitask':  # Any first token is a task.
    macros |= {
      'multitask.multitask.vocab_size': 128,
      'multitask.multitask.tasks': 126,
    }
  hosted, ours = work / f'hosted_{file}', work / f'ours_{file}'
  run(
    work,
    't5x.train',
    f'methods/{file}.gin',
    't5x/finetune.gin',
    devices=8,
    MODEL_DIR=str(hosted),
    TRAIN_STEPS=START + 10,
    **FOUR_BY_TWO,
    **macros,
    **UNSHUFFLED,
  )
  run(
    work,
    'ptune train',
    f'methods/{file}.gin',
    'runs/train.gin',
    devices=8,
    MODEL_DIR=str(ours),
    TRAIN_STEPS=10,
    EVAL_SPLIT=None,
    MODEL_PARALLEL=2,
    **macros,
  )
  source = open_checkpoint(hosted / f'checkpoint_{START + 10}')
  expected = open_checkpoint(ours).leaves
  assert expected
  moved = False
  for path, leaf in open_checkpoint(base).leaves.items():
    if path not in expected:
      np.testing.assert_array_equal(
        source.leaves[path].read(), leaf.read(), err_msg=path
      )
  for path, leaf in expected.items():
    got, wanted = source.leaves[path].read(), leaf.read()
    np.testing.assert_allclose(got, wanted, atol=1e-5, err_msg=path)
    before = open_checkpoint(hosted / f'checkpoint_{START}').leaves[path].read()
    moved |= np.max(np.abs(got - before)) > 1e-4
  assert moved

  saved = hosted / 'numpy_checkpoints' / f'checkpoint_{START + 10}'
  written = sorted(path.name for path in saved.glob('*'))
  prompts = ours / 'prompts'
  if file == 'full':
    assert not written
  elif (prompts / 'step_10.npy').exists():
    assert written == ['encoder.prompt.prompt.prompt']
    np.testing.assert_allclose(
      prompt_init.read(saved / written[0]),
      np.load(prompts / 'step_10.npy'),
      atol=1e-5,
    )
  else:
    assert written == ['adapter.json', 'adapter.safetensors']
    theirs, facts = open_trained(saved / 'adapter.safetensors')
    own, own_facts = open_trained(prompts / 'step_10.safetensors')
    assert facts['method'] == own_facts['method']
    assert facts['settings'] == own_facts.get('settings', {})
    assert facts['step'] == START + 10
    assert set(theirs.leaves) == set(own.leaves)
    for path, leaf in own.leaves.items():
      np.testing.assert_allclose(
        theirs.leaves[path].read(), leaf.read(), atol=1e-5, err_msg=path
      )


@pytest.fixture(scope='module')
def ours(work, base):
  """The prompt after ten steps of `ptune train`."""
  run(
    work,
    'ptune train',
    'prompts/random_uniform.gin',
    'runs/train.gin',
    MODEL_DIR=str(work / 'ours'),
    INITIAL_CHECKPOINT_PATH=base,
    TRAIN_STEPS=10,
    EVAL_SPLIT=None,
    PROMPT_LENGTH=5,
    **TRAIN,
  )
  return np.load(work / 'ours' / 'prompts' / 'step_10.npy')


def train_and_kill(work, base, name, use_orbax):
  """Trains for ten steps under T5X, killed by SIGKILL on the way."""
  args = command(
    't5x.train',
    'prompts/random_uniform.gin',
    't5x/finetune.gin',
    work=work,
    MODEL_DIR=str(work / name),
    INITIAL_CHECKPOINT_PATH=base,
    TRAIN_STEPS=START + 10,
    EVAL_PERIOD=2,
    EVAL_STEPS=1,
    PROMPT_LENGTH=5,
    **TRAIN,
    **UNSHUFFLED,
    **{'train.use_orbax': use_orbax},
  )
  process = start(work, args)
  deadline = time.monotonic() + 300
  while not (work / name / f'checkpoint_{START + 4}').is_dir():
    assert time.monotonic() < deadline, process.output[-5000:]
    time.sleep(0.05)
  process.send(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  assert not (work / name / f'checkpoint_{START + 10}').exists()
  again = start(work, args)
  assert again.wait() == 0, again.output[-5000:]
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
  checkpoint = trained / f'checkpoint_{START + 10}'
  params = parameters.unflatten(
    {k: v.read() for k, v in open_checkpoint(checkpoint).leaves.items()}
  )
  method = prompt.prompt(5)
  model = models.EncoderDecoderModel(
    network.Transformer(TINY, method.placements)
  )

  def predict(split, how):
    tokens, scores = model.predict(
      params, _inputs(split), LENGTHS['targets'], how
    )
    return np.asarray(tokens), np.asarray(scores)

  # A checkpoint of T5X holds the base and the prompt.
  run(
    work,
    't5x.eval',
    'methods/prompt.gin',
    't5x/eval.gin',
    CHECKPOINT_PATH=str(checkpoint),
    EVAL_OUTPUT_DIR=str(work / 'evaluated'),
    PROMPT_LENGTH=5,
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
    't5x.infer',
    'methods/prompt.gin',
    't5x/infer.gin',
    CHECKPOINT_PATH=str(numerics / 'hf' / 't5_1_1'),
    PROMPT_FILE=str(saved_prompt(trained, START + 10)),
    INFER_OUTPUT_DIR=str(work / 'inferred'),
    PROMPT_LENGTH=5,
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


def test_infer_of_a_safetensors_file_equals_ptune(work, base, numerics):
  """And a run of ptune gives T5X what it trained."""
  macros = {
    'CHECKPOINT_PATH': base,
    'PROMPT_FILE': str(work / 'lora' / 'prompts' / 'step_4.safetensors'),
  }
  run(
    work,
    'ptune train',
    'methods/lora.gin',
    'runs/train.gin',
    MODEL_DIR=str(work / 'lora'),
    INITIAL_CHECKPOINT_PATH=base,
    TRAIN_STEPS=4,
    EVAL_SPLIT=None,
    **(TRAIN | {'LEARNING_RATE': 0.1}),  # Far enough to answer otherwise.
  )
  run(
    work,
    't5x.infer',
    'methods/lora.gin',
    't5x/infer.gin',
    INFER_OUTPUT_DIR=str(work / 'lora_hosted'),
    **macros,
  )
  (file,) = (work / 'lora_hosted').glob('hosted-predict.jsonl-?????-of-*1')
  got = [json.loads(line)['prediction'] for line in file.open()]
  base_params = {k: v.read() for k, v in open_checkpoint(base).leaves.items()}
  trained, _ = open_trained(macros['PROMPT_FILE'])
  adapters = {k: v.read() for k, v in trained.leaves.items()}
  inputs = _inputs('test')

  def answers(params, placements):
    model = models.EncoderDecoderModel(network.Transformer(TINY, placements))
    tokens, _ = model.predict(
      parameters.unflatten(params), inputs, LENGTHS['targets']
    )
    return [_until_eos(row) for row in tokens]

  placements = lora.lora(8, 16.0).placements
  expected = answers(base_params | adapters, placements)
  assert [_until_eos(row) for row in got] == expected
  assert expected != answers(base_params, ())


def _inputs(split):
  """[rows, length] int32, as the task has them."""
  rows = importlib.import_module('hosted_task').rows(split)
  inputs = np.zeros((len(rows), LENGTHS['inputs']), np.int32)
  for i, row in enumerate(rows):
    line = [*row['inputs'], 1]
    inputs[i, : len(line)] = line
  return inputs


def _until_eos(row):
  """What a prediction says: [5, 9, 1, 0] -> [5, 9, 1]."""
  row = [int(token) for token in row]
  return row[: row.index(1) + 1] if 1 in row else row
