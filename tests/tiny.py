"""A T5, SeqIO tasks and runs that are small enough to train in a test.

Tokens are bytes. Tests import this module, and command lines started with
`command` pass it as MIXTURE_OR_TASK_MODULE.
"""

import atexit
import dataclasses
import functools
import importlib
import inspect
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from ptune import train
from ptune.analysis import ablate
from ptune.methods import prompt
from ptune.model import network, parameters, partitioning, sizes, structure
from ptune.training import checkpoints
from ptune.training import settings as settings_lib
from ptune.training.state import TrainState
from tests import QUICK_FLAGS

import seqio  # isort: skip  (after seqio_task, which quiets TensorFlow)
import tensorflow as tf  # isort: skip

CONFIG = sizes.T5Config(
  vocab_size=264,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  mlp_dim=32,
  num_encoder_layers=1,
  num_decoder_layers=1,
)
GIN = """\
from __gin__ import dynamic_registration
from ptune.model import sizes
MODEL = @sizes.t5()
sizes.t5:
  vocab_size = 264
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  mlp_dim = 32
  num_encoder_layers = 1
  num_decoder_layers = 1
"""
LENGTHS = {'inputs': 32, 'targets': 4}
SIZES = {'train': 64, 'validation': 21, 'test': 12}
LABELS = ('no', 'yes')


def rows(split: str) -> list[tuple[str, str]]:
  """Returns [(word, label)]: words of a and b, labelled by the commoner one."""
  draw = random.Random(split)
  words = [
    ''.join(draw.choices('ab', k=draw.randint(1, 31))) for _ in range(64)
  ]
  return [
    (word, LABELS[word.count('a') > word.count('b')])
    for word in words[: SIZES[split]]
  ]


def _source(splits, empty=()):
  def dataset_fn(split, shuffle_files, seed=None):
    del shuffle_files, seed
    pairs = [] if split in empty else rows(split)
    columns = [[p[i] for p in pairs] for i in (0, 1)]
    return tf.data.Dataset.from_tensor_slices(
      {
        'inputs': tf.constant(columns[0], tf.string),
        'targets': tf.constant(columns[1], tf.string),
      }
    )

  counts = {s: 0 if s in empty else SIZES[s] for s in splits}
  return seqio.FunctionDataSource(
    dataset_fn, splits=splits, num_input_examples=counts
  )


def _interrupted(split, shuffle_files, seed=None):
  """Requests a stop during a run's setup, instead of reading any rows."""
  del split, shuffle_files, seed
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(60)


def accuracy(targets, predictions):
  right = sum(t == p for t, p in zip(targets, predictions, strict=True))
  return {'accuracy': 100 * right / len(targets)}


def right_score(targets, predictions, aux_values):
  """Returns the summed log probability of the correct answers."""
  scores = aux_values['scores']
  pairs = zip(targets, predictions, scores, strict=True)
  return {'right_score': sum(s for t, p, s in pairs if t == p)}


def mean_score(targets, scores):
  scores = scores[0] if isinstance(scores, tuple) else scores
  assert len(scores) == len(targets)
  return {'mean_score': sum(scores) / len(scores)}


def _add(
  name, splits=tuple(SIZES), empty=(), metrics=(), extra_ids=0, source=None
):
  feature = seqio.Feature(seqio.ByteVocabulary(extra_ids), add_eos=True)
  seqio.TaskRegistry.add(
    name,
    source=source or _source(splits, empty),
    preprocessors=[
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={'inputs': feature, 'targets': feature},
    metric_fns=list(metrics),
  )


_add('tiny', metrics=(accuracy, mean_score))
_add('tiny_b', metrics=(accuracy,))
_add('tiny_aux', metrics=(right_score,))
_add('tiny_no_metrics')
_add('tiny_no_validation', splits=('train',))
_add('tiny_no_train_rows', empty=('train',))
_add('tiny_no_validation_rows', empty=('validation',), metrics=(accuracy,))
_add('tiny_large_vocabulary', extra_ids=100)
_add(
  'tiny_interrupted',
  source=seqio.FunctionDataSource(_interrupted, splits=list(SIZES)),
)
seqio.MixtureRegistry.add('tiny_mixture', ['tiny', 'tiny_b'], default_rate=1.0)


# ----------------------------------------------------------------------- runs


@functools.cache
def directory() -> pathlib.Path:
  """Returns a directory that tests share; no test may change its files."""
  path = pathlib.Path(tempfile.mkdtemp(prefix='ptune-tiny-'))
  atexit.register(shutil.rmtree, path, ignore_errors=True)
  (path / 'tiny.gin').write_text(GIN)
  return path


@functools.cache
def base() -> str:
  """Returns the checkpoint of a base model with random weights."""
  return make_base(directory() / 'base', seed=0)


def make_base(path: os.PathLike[str], seed: int) -> str:
  rng = np.random.default_rng(seed)
  values = {
    path: rng.normal(size=x.shape, scale=0.3).astype(np.float32)
    for path, x in structure.parameters(network.Transformer(CONFIG)).items()
  }
  state = TrainState(jnp.int32(8), parameters.unflatten(values), {})
  directory = pathlib.Path(path, 'checkpoints')
  with checkpoints.Checkpoints(directory, start=0) as saved:
    saved.save(state, {})
  return os.fspath(path)


def settings(model_dir, **changes):
  """Returns `train` settings for 12 steps with 3 evaluations; see `grouped`."""
  if 'initial_checkpoint_path' not in changes:
    changes['initial_checkpoint_path'] = base()
  return {
    'model_dir': os.fspath(model_dir),
    'mixture_or_task_name': 'tiny_no_metrics',
    'task_feature_lengths': LENGTHS,
    'train_steps': 12,
    'config': dataclasses.replace(CONFIG, dropout_rate=0.1),
    'method': prompt.prompt(3),
    'batch_size': 8,
    'bucket_multiple': None,
    'eval_period': 5,
    'checkpoint_period': 4,
    'log_period': 3,
    'seed': 1,
    **changes,
  }


# The groups of settings, and the fields that have another name in tests.
GROUPS = {
  'data': settings_lib.Data,
  'evaluation': settings_lib.Evaluation,
  'saving': settings_lib.Saving,
  'trained': settings_lib.Trained,
  'pruning': ablate.Pruning,
}
FIELDS = {
  'mixture_or_task_name': ('data', 'task'),
  'mixture_or_task_module': ('data', 'module'),
  'task_feature_lengths': ('data', 'feature_lengths'),
  'eval_split': ('evaluation', 'split'),
  'eval_steps': ('evaluation', 'steps'),
  'eval_batch_size': ('evaluation', 'batch_size'),
  'eval_period': ('evaluation', 'period'),
  'keep_rows': ('pruning', 'rows'),
  'keep_pieces': ('pruning', 'pieces'),
  'pieces': ('pruning', 'pieces_a_row'),
}


def grouped(program, **flat):
  """Puts flat settings into the groups that a program takes.

  batch_size=8, eval_steps=2
  -> data=Data(batch_size=8), evaluation=Evaluation(steps=2)
  """
  taken = inspect.signature(program).parameters
  found = {group: {} for group in GROUPS if group in taken}
  others = {}
  for name, value in flat.items():
    group, field = FIELDS.get(name, (None, name))
    if name not in taken and group is None:
      group = next(
        group for group in found if field in GROUPS[group].__dataclass_fields__
      )
    if group is None:
      others[name] = value
    else:
      found[group][field] = value
  if 'data' in found:  # In `train_many`, each run names its own task.
    found['data'].setdefault('task', '')
  return others | {
    group: GROUPS[group](**values)
    for group, values in found.items()
    if values or group == 'trained'
  }


def run(model_dir, **changes):
  """Trains in this process, by default on a task without metrics.

  It uses one device, because that compiles faster.
  """
  settled = settings(model_dir, **changes)
  with one_device():
    return train.train(**grouped(train.train, **settled))


def use(program, output_dir, **changes):
  """Calls a program that uses a trained model on the task `tiny`."""
  settled = {
    'mixture_or_task_name': 'tiny',
    'task_feature_lengths': LENGTHS,
    'config': CONFIG,
    'method': prompt.prompt(3),
    'output_dir': output_dir and str(output_dir),
    'batch_size': 8,
    **changes,
  }
  with one_device():
    return program(**grouped(program, **settled))


@functools.cache
def trained() -> pathlib.Path:
  """Returns the directory of a finished run with one evaluation at its end."""
  path = directory() / 'trained'
  run(path, mixture_or_task_name='tiny', eval_period=12)
  return path


def one_device():
  """A context in which meshes have one device, so programs compile faster."""
  make_mesh = functools.partial(
    partitioning.make_mesh, devices=jax.devices()[:1]
  )
  return mock.patch.object(partitioning, 'make_mesh', make_mesh)


def records(model_dir: os.PathLike[str]) -> list[dict]:
  """Returns metrics.jsonl without the fields that depend on the clock."""
  timing = ('seconds_per_step', 'examples_per_second')
  lines = pathlib.Path(model_dir, 'metrics.jsonl').read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if k not in timing}
    for line in lines
  ]


def files(model_dir: os.PathLike[str]) -> dict[str, bytes]:
  """Returns the contents of all files below a directory, by name."""
  top = pathlib.Path(model_dir)
  return {
    str(path.relative_to(top)): path.read_bytes()
    for path in sorted(top.rglob('*'))
    if path.is_file()
  }


# ------------------------------------------------------------------- commands


def arguments(program: str, *more: str, **macros: object) -> list[str]:
  """Returns a `ptune` command line with this module's model and task."""
  macros = {
    'MIXTURE_OR_TASK_MODULE': 'tests.tiny',
    'MIXTURE_OR_TASK_NAME': 'tiny',
    'TASK_FEATURE_LENGTHS': LENGTHS,
    'BATCH_SIZE': 8,
    'PROMPT_LENGTH': 3,
    **macros,
  }
  if program == 'train':
    macros.setdefault('INITIAL_CHECKPOINT_PATH', base())
  return [
    program,
    f'--gin_file={directory()}/tiny.gin',
    f'--gin_file=runs/{program}.gin',
    '--gin_file=prompts/random_uniform.gin',
    *(f'--gin.{name}={value!r}' for name, value in macros.items()),
    *more,
  ]


class Command:
  """A `ptune` process, with its own signals and exit status.

  It is forked from a server that has already imported the heavy packages, so
  it starts at once.
  """

  def __init__(self, arguments, log=None, call='', **environment):
    """Starts `ptune` with arguments, or calls `module:function` with them."""
    self._log = pathlib.Path(log or tempfile.mkstemp(dir=directory())[1])
    self._server = _server()
    _send(
      self._server,
      {
        'arguments': arguments,
        'log': str(self._log),
        'call': call or 'ptune.cli:main',
        'env': environment,
      },
    )
    self.pid = int(self._server.stdout.readline())

  @property
  def output(self) -> str:
    """Returns all stdout and stderr so far."""
    return self._log.read_text()

  def wait_for(self, text: str, seconds: float = 60) -> None:
    """Waits until the output contains a text."""
    end = time.monotonic() + seconds
    while text not in self.output:
      assert time.monotonic() < end, f'no {text!r} in: {self.output}'
      time.sleep(0.005)

  def send(self, number: signal.Signals) -> None:
    os.kill(self.pid, number)

  def wait(self) -> int:
    """Waits for the end; returns the exit status, or minus the signal."""
    _send(self._server, {'wait': self.pid})
    return int(self._server.stdout.readline())


def processes(
  count: int, arguments: list[str], devices: int = 1, **how: str
) -> list[Command]:
  """Starts `count` processes of one run with `devices` fake devices each."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  flags = f'{QUICK_FLAGS} --xla_force_host_platform_device_count={devices}'
  return [
    Command(
      [
        *arguments,
        f'--coordinator_address=localhost:{port}',
        f'--process_count={count}',
        f'--process_index={index}',
      ],
      XLA_FLAGS=flags,
      **how,
    )
    for index in range(count)
  ]


def command(*arguments: str, **environment: str) -> tuple[int, str]:
  """Runs `ptune` in a process; returns its exit status and its output."""
  process = Command(list(arguments), **environment)
  return process.wait(), process.output


def _send(server, message) -> None:
  server.stdin.write(json.dumps(message) + '\n')
  server.stdin.flush()


def environment() -> dict[str, str]:
  """Returns variables for processes: one device, and fast compilation."""
  return {
    **os.environ,
    'XLA_FLAGS': QUICK_FLAGS,
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
  }


@functools.cache
def _server() -> subprocess.Popen:
  server = subprocess.Popen(
    [sys.executable, '-c', 'from tests import tiny; tiny.serve()'],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parents[1],
    env=environment(),
  )
  atexit.register(server.stdin.close)
  return server


def serve() -> None:
  """Serves stdin: each line starts a process or waits for one."""
  for line in sys.stdin:
    message = json.loads(line)
    if 'wait' in message:
      status = os.waitpid(message['wait'], 0)[1]
      print(os.waitstatus_to_exitcode(status), flush=True)
      continue
    pid = os.fork()
    if pid:
      print(pid, flush=True)
      continue
    log = os.open(message['log'], os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(message['env'])
    sys.argv = ['ptune', *message['arguments']]
    module, function = message['call'].split(':')
    sys.exit(getattr(importlib.import_module(module), function)())
