"""A SeqIO task: found by its name, checked, and its examples one by one."""

import difflib
import importlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from absl import logging

# TensorFlow is loud. Importing jax sets the level to 1; another is the user's.
if os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1') == '1':
  os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
import seqio
import tensorflow as tf

from ptune.errors import UserError

# The accelerators are JAX's: TensorFlow would take all of a GPU's memory.
tf.config.set_visible_devices([], 'GPU')
tf.get_logger().setLevel('ERROR')

FEATURES = ('inputs', 'targets')
# Rows in which all labels of a task are looked for.
LABELLED_ROWS = 100_000

Provider = seqio.Task | seqio.Mixture
Batch = dict[str, np.ndarray]


def load(name: str, module: str | Sequence[str] | None = None) -> Provider:
  """Imports MIXTURE_OR_TASK_MODULE and returns the task or mixture `name`.

  Where it is not registered then, ptune's own tasks are.

  Raises:
    ValueError: A module does not exist, or no task or mixture has this name.
  """
  if not isinstance(name, str):
    raise UserError(
      f'MIXTURE_OR_TASK_NAME is {name!r}; it must be a name, such as'
      " 'glue_sst2_v200'"
    )
  for path in [module] if isinstance(module, str) else module or ():
    try:
      importlib.import_module(path)
    except ModuleNotFoundError as error:
      if error.name is None or not f'{path}.'.startswith(f'{error.name}.'):
        raise  # the module exists, something that it imports does not
      raise UserError(
        f'MIXTURE_OR_TASK_MODULE {path!r} cannot be imported, there is no '
        f'module {error.name!r}. Install it or put it on PYTHONPATH.'
      ) from error
  if not _is_registered(name):  # It may be one of ptune's own.
    importlib.import_module('ptune.tasks.library')
  if not _is_registered(name):
    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.3)
    raise UserError(
      f'MIXTURE_OR_TASK_NAME {name!r} is not registered; nearest of the '
      f'{len(names)} registered names: {", ".join(near) or "none"}. Set '
      'MIXTURE_OR_TASK_MODULE to the module that registers it (imported: '
      f'{module}).'
    )
  return seqio.get_mixture_or_task(name)


def _is_registered(name: str) -> bool:
  return name in seqio.TaskRegistry.names() or (
    name in seqio.MixtureRegistry.names()
  )


def check(
  task: Provider,
  feature_lengths: Mapping[str, int],
  split: str | None,
  use_cached: bool = False,
) -> None:
  """Raises a ValueError that lists all that keeps T5 from reading a task.

  Without a split, only that it can encode texts from elsewhere is checked.
  """
  if not isinstance(feature_lengths, Mapping):
    raise UserError(
      f'TASK_FEATURE_LENGTHS is {feature_lengths!r}, expected the lengths by '
      "feature, such as {'inputs': 128, 'targets': 8}."
    )
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
    if name not in feature_lengths:
      wrong.append(f'TASK_FEATURE_LENGTHS has no length for {name!r}')
  for name, length in feature_lengths.items():
    entry = f'TASK_FEATURE_LENGTHS[{name!r}]'
    if name not in FEATURES:
      wrong.append(
        f"{entry}: expected inputs and targets only; remove it (the task's "
        f'features: {has})'
      )
    elif not isinstance(length, int) or length < 1:
      wrong.append(f'{entry} is {length!r}, expected at least 1 token')
  if split is not None and split not in task.splits:
    splits = ', '.join(sorted(task.splits))
    wrong.append(f'no split {split!r}; its splits: {splits}')
  for part in seqio.get_subtasks(task) if split is not None else ():
    if part.requires_caching and not use_cached:
      wrong.append(f'{part.name} must be cached; set USE_CACHED_TASKS = True')
    if use_cached and part.supports_caching and not part.cache_dir:
      searched = list(seqio.utils.get_global_cache_dirs())
      wrong.append(
        f'{part.name} is not in the cache directories {searched}; cache it '
        'with seqio_cache_tasks, or set USE_CACHED_TASKS = False'
      )
  if wrong:
    raise UserError(f'Task {task.name!r}: ' + '; '.join(wrong) + '.')


def vocabulary(task: Provider) -> seqio.Vocabulary:
  """Returns the one vocabulary of a task's inputs and targets.

  Raises:
    ValueError: They differ; T5 has one embedding for both.
  """
  inputs, targets = (task.output_features[f].vocabulary for f in FEATURES)
  if inputs != targets:
    raise UserError(
      f'Task {task.name!r} has the vocabulary {inputs} for inputs and '
      f'{targets} for targets, expected one for both: T5 embeds them with the '
      'same parameter. Give the features the same vocabulary.'
    )
  return inputs


def check_vocabulary(task: Provider, embedding_rows: int) -> None:
  """Raises a ValueError if a task has token ids that a model cannot embed.

  Fewer ids than rows are usual: T5 has 32,100 pieces and 32,128 rows.
  """
  size = vocabulary(task).vocab_size
  if size > embedding_rows:
    raise UserError(
      f'Task {task.name!r} has a vocabulary of {size} ids, expected at most '
      f"the {embedding_rows} rows of the model's embedding. Use the "
      'vocabulary that the model was trained with, or another model.'
    )


def examples(
  task: Provider,
  feature_lengths: Mapping[str, int],
  split: str,
  use_cached: bool = False,
) -> Iterator[tuple[dict[str, str], Batch]]:
  """Yields what a split holds, in order: its texts, and its model features.

  Texts are `inputs` and `targets`, as they were before tokenisation.
  """
  check(task, feature_lengths, split, use_cached)
  dataset = task.get_dataset(
    dict(feature_lengths),
    split,
    shuffle=False,
    num_epochs=1,
    use_cached=use_cached,
    seed=0,
  )
  vocab = vocabulary(task)
  for example in dataset.as_numpy_iterator():
    texts = {}
    for name in FEATURES:
      text = example.get(f'{name}_pretokenized')
      if text is None:
        text = vocab.decode(example[name].tolist()).encode()
      texts[name] = text.decode('utf-8', errors='replace')
    yield texts, model_features(example['inputs'], example['targets'])


def encode(
  task: Provider,
  feature_lengths: Mapping[str, int],
  texts: Mapping[str, str],
) -> tuple[dict[str, str], Batch]:
  """The same for texts from elsewhere, tokenised as the task's features are."""
  vocab = vocabulary(task)
  ids = {}
  for name in FEATURES:
    feature, limit = task.output_features[name], feature_lengths[name]
    tokens = vocab.encode(texts.get(name, ''))
    room = limit - int(feature.add_eos)
    if len(tokens) > room:
      logging.log_first_n(
        logging.WARNING,
        'the %s %.40r... have %d tokens and are cut to %d (further texts that'
        ' are cut are not told)',
        3,
        name,
        texts[name],
        len(tokens),
        room,
      )
    tokens = tokens[:room]
    ids[name] = np.array(tokens + [vocab.eos_id] * feature.add_eos, np.int32)
  return dict(texts), model_features(ids['inputs'], ids['targets'])


def model_features(inputs: np.ndarray, targets: np.ndarray) -> Batch:
  """One example's features, as EncDecFeatureConverter makes them, unpadded."""
  return {
    'encoder_input_tokens': inputs,
    'decoder_target_tokens': targets,
    'decoder_input_tokens': np.pad(targets, (1, 0))[:-1],
    'decoder_loss_weights': np.ones_like(targets),
  }


def text_ids(
  text: str,
  mixture_or_task_name: str,
  mixture_or_task_module: str | Sequence[str] | None = None,
) -> tuple[int, ...]:
  """The pieces of a text in a task's vocabulary, without EOS."""
  task = load(mixture_or_task_name, mixture_or_task_module)
  return tuple(vocabulary(task).encode(text))


def target_ids(
  labels: Sequence[str] | None,
  task_feature_lengths: Mapping[str, int],
  mixture_or_task_name: str,
  mixture_or_task_module: str | Sequence[str] | None = None,
) -> tuple[tuple[int, ...], ...]:
  """What the targets of a task are for each of its class labels.

  Args:
    labels: CLASS_LABELS.
    task_feature_lengths: TASK_FEATURE_LENGTHS.
    mixture_or_task_name: The task.
    mixture_or_task_module: Imported first; registers it.

  Raises:
    ValueError: If there are not two labels at least, or two become the same.
  """
  if labels is None or isinstance(labels, str) or len(set(labels)) < 2:
    raise UserError(
      f'CLASS_LABELS is {labels!r}; the loss needs the list of all targets,'
      " such as ['no', 'yes']"
    )
  task = load(mixture_or_task_name, mixture_or_task_module)
  found = {
    label: tuple(
      encode(task, task_feature_lengths, {'targets': label})[1][
        'decoder_target_tokens'
      ].tolist()
    )
    for label in labels
  }
  if len(set(found.values())) < len(found):
    raise UserError(
      f'some of CLASS_LABELS are the same within the {task_feature_lengths}'
      f' tokens of TASK_FEATURE_LENGTHS: {found}; raise targets'
    )
  return tuple(found.values())


def distinct_targets(
  task: Provider,
  feature_lengths: Mapping[str, int],
  most: int = 100,
  use_cached: bool = False,
) -> list[str]:
  """The labels of a classification task: its distinct targets, sorted.

  Args:
    task: The task; of its training split, LABELLED_ROWS are read at most.
    feature_lengths: TASK_FEATURE_LENGTHS.
    most: More than this, and it is no classification task.
    use_cached: USE_CACHED_TASKS.

  Raises:
    ValueError: If there are too many.
  """
  found: set[str] = set()
  rows = examples(task, feature_lengths, 'train', use_cached)
  for texts, _ in itertools.islice(rows, LABELLED_ROWS):
    found.add(texts['targets'])
    if len(found) > most:
      raise UserError(
        f'Task {task.name!r} has more than {most} distinct targets, such as '
        f'{sorted(found)[:3]}, so its class labels cannot be told. Set '
        'CLASS_LABELS, or choose another file of prompts/.'
      )
  return sorted(found)
