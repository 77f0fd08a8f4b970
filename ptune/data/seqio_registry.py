"""SeqIO tasks: finds and checks them; their vocabulary and their texts.

`seqio_task` imports this module, and TensorFlow with it, only when a SeqIO task
is used.
"""

import contextlib
import functools
import importlib
import os
import re
import socket
import traceback
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# TensorFlow is loud. Importing jax sets the level to 1; another is the user's.
if os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1') == '1':
  os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader

from ptune.errors import UserError, nearest

# The accelerators are JAX's: TensorFlow would take all of a GPU's memory.
tf.config.set_visible_devices([], 'GPU')
tf.get_logger().setLevel('ERROR')

FEATURES = ('inputs', 'targets')

Provider = seqio.Task | seqio.Mixture


def load(name: str, module: str | Sequence[str] | None = None) -> Provider:
  """See `seqio_task.load`."""
  for path in [module] if isinstance(module, str) else module or ():
    _import(path)
  if not _is_registered(name):  # It may be one of ptune's own.
    importlib.import_module('ptune.tasks.library')
  if not _is_registered(name):
    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    near = nearest(name, names, most=0, cutoff=0.3)
    raise UserError(
      f'MIXTURE_OR_TASK_NAME {name!r} is not among the {len(names)} registered'
      f' names{near or "."} Set MIXTURE_OR_TASK_MODULE to the module that'
      f' registers it (imported: {module}).'
    )
  return seqio.get_mixture_or_task(name)


def _import(path: str) -> None:
  """Imports a module with a user's tasks.

  Raises:
    UserError: If the module does not exist or raises an error.
  """
  what = f'MIXTURE_OR_TASK_MODULE {path!r} cannot be imported'
  if not re.fullmatch(r'[^\W\d]\w*(\.[^\W\d]\w*)*', path):
    raise UserError(f'{what}: expected the name of a module, such as my.tasks')
  try:
    importlib.import_module(path)
  except UserError:
    raise
  except ModuleNotFoundError as error:
    where = (
      ''
      if error.name and f'{path}.'.startswith(f'{error.name}.')
      else (f' at {_place(error)}')
    )
    raise UserError(
      f'{what}, there is no module {error.name!r}{where}. Install it or put it'
      ' on PYTHONPATH.'
    ) from error
  except SystemExit as error:
    raise UserError(f'{what}: it ended Python, at {_place(error)}') from error
  except Exception as error:
    if path.startswith('ptune.'):  # A bug of ours.
      raise
    raise UserError(
      f'{what}: at {_place(error)}: {type(error).__name__}: {error}'
    ) from error


def _place(error: BaseException) -> str:
  """The file and line where an error was raised."""
  if isinstance(error, SyntaxError):
    return f'{error.filename}, line {error.lineno}'
  # The last frame in the user's code, not in Python's import machinery.
  trace = traceback.extract_tb(error.__traceback__)
  frames = [f for f in trace if 'importlib' not in f.filename] or trace
  return f'{frames[-1].filename}, line {frames[-1].lineno}'


def _is_registered(name: str) -> bool:
  return name in seqio.TaskRegistry.names() or (
    name in seqio.MixtureRegistry.names()
  )


def problems(task: Provider, split: str | None, use_cached: bool) -> list[str]:
  """Lists why T5 cannot read a task, except for reasons of length."""
  wrong = []
  has = ', '.join(task.output_features)
  for name in FEATURES:
    feature = task.output_features.get(name)
    if feature is None:
      wrong.append(
        f'no feature {name!r}; rename one with rekey (it has: {has})'
      )
    elif feature.dtype != tf.int32 or feature.rank != 1:
      kind = f'{feature.dtype.name} of rank {feature.rank}'
      wrong.append(f'{name!r} is {kind}, expected token ids: int32 of rank 1')
  for part in seqio.get_subtasks(task) if split is not None else ():
    if part.requires_caching and not use_cached:
      wrong.append(f'{part.name} must be cached; set USE_CACHED_TASKS = True')
    if use_cached and part.supports_caching and not part.cache_dir:
      searched = list(seqio.utils.get_global_cache_dirs())
      wrong.append(
        f'{part.name} is not in the cache directories {searched}; cache it with'
        ' seqio_cache_tasks, or set USE_CACHED_TASKS = False'
      )
  return wrong


def splits(task: Provider, split: str | None, use_cached: bool) -> list[str]:
  """See `seqio_task.splits`."""
  for part in seqio.get_subtasks(task):
    loader = getattr(part.source, 'tfds_dataset', None)
    cached = use_cached and part.supports_caching
    if loader is None or cached:
      continue
    try:
      with _few_retries_offline():
        if split in part.splits:
          loader.load(split, shuffle_files=False)
    except (OSError, tf.errors.OpError) as error:
      reason = ' '.join(str(error).split())
      raise UserError(
        f'Task {part.name!r} reads {loader.name} of TFDS, which is not in'
        f' {loader.data_dir or tfds.core.constants.DATA_DIR} and cannot be'
        f' downloaded: {reason:.300}. Without a network, load it on another'
        ' machine by python -c "import tensorflow_datasets as tfds;'
        f" tfds.load('{loader.name}')\", copy its ~/tensorflow_datasets here,"
        ' and give that directory as --tfds_data_dir'
      ) from error
  return sorted(task.splits)


@contextlib.contextmanager
def _few_retries_offline() -> Iterator[None]:
  """Lets TFDS give up soon if there is no network.

  It tries a download 11 times, for 200 s. If there is a network, we leave that
  as it is.
  """
  before = downloader.MAX_RETRIES
  if not _is_online():
    downloader.MAX_RETRIES = 2
  try:
    yield
  finally:
    downloader.MAX_RETRIES = before


@functools.cache
def _is_online() -> bool:
  """Whether there is a network: a proxy, or a host that TFDS uses."""
  if urllib.request.getproxies():
    return True
  try:
    socket.create_connection(('storage.googleapis.com', 443), timeout=5).close()
  except OSError:
    return False
  return True


def postprocessors(task: Provider) -> list[Any]:
  """The postprocessors of a task, or of each task in a mixture."""
  return [part.postprocessor for part in seqio.get_subtasks(task)]


def vocabulary(task: Provider) -> seqio.Vocabulary:
  """The vocabulary of a task's inputs and targets.

  Raises:
    ValueError: If they have different ones, because T5 has one embedding.
  """
  inputs, targets = (task.output_features[f].vocabulary for f in FEATURES)
  if inputs != targets:
    raise UserError(
      f'Task {task.name!r} has the vocabulary {inputs} for inputs and {targets}'
      ' for targets, expected one for both: T5 embeds them with the same'
      ' parameter. Give the features the same vocabulary.'
    )
  return inputs


def read_vocabulary(task: Provider) -> seqio.Vocabulary:
  """The vocabulary of a task, after reading its file.

  Raises:
    UserError: If the file cannot be read, or there are two vocabularies.
  """
  inputs = vocabulary(task)
  try:
    inputs.vocab_size  # noqa: B018  (reads the file)
  except (tf.errors.OpError, OSError, RuntimeError) as error:
    file = getattr(inputs, 'sentencepiece_model_file', None) or inputs
    raise UserError(
      f'Task {task.name!r}: its vocabulary {file} cannot be read:'
      f' {" ".join(str(error).split())}. Set VOCABULARY (or PTUNE_VOCABULARY)'
      ' to the SentencePiece file or the directory of your model, such as'
      " 'ptune://tiny'"
    ) from error
  return inputs


def examples(
  task: Provider,
  feature_lengths: Mapping[str, int],
  split: str,
  use_cached: bool = False,
) -> Iterator[tuple[dict[str, str], dict[str, np.ndarray]]]:
  """Yields the texts and the token ids of a split's examples, in order.

  The texts are `inputs` and `targets` before tokenisation.
  """
  vocab = read_vocabulary(task)
  dataset = task.get_dataset(
    dict(feature_lengths),
    split,
    shuffle=False,
    num_epochs=1,
    use_cached=use_cached,
    seed=0,
  )
  for example in dataset.as_numpy_iterator():
    texts = {}
    for name in FEATURES:
      text = example.get(f'{name}_pretokenized')
      if text is None:
        text = vocab.decode(example[name].tolist()).encode()
      texts[name] = text.decode('utf-8', errors='replace')
    yield texts, {name: example[name] for name in FEATURES}
