"""A task: found, checked, and its examples one by one, whoever reads its rows.

A task is a user's own `texts.TextTask`, which needs no TensorFlow, or one of
SeqIO's, whose rows `seqio_rows` reads.
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging
from etils import epath

from ptune.convert.pieces import Vocabulary
from ptune.convert.vocabulary import check_same
from ptune.data.text_rows import TextRows
from ptune.errors import UserError
from ptune.host import paths
from ptune.host.quiet import quiet_stderr
from ptune.model.sizes import TokenIds
from ptune.tasks import labels as labels_lib
from ptune.tasks.metrics import UNLABELLED
from ptune.tasks.texts import TextTask

if TYPE_CHECKING:
  import seqio

  from ptune.data.seqio_rows import SeqioRows

  Provider = TextTask | seqio.Task | seqio.Mixture
else:
  Provider = Any  # So that SeqIO need not be imported to name it.

FEATURES = ('inputs', 'targets')
# Rows in which all labels of a task are looked for.
LABELLED_ROWS = 100_000

Batch = dict[str, np.ndarray]


def _seqio() -> Any:
  """The module that imports SeqIO, and with it TensorFlow."""
  with quiet_stderr():
    from ptune.data import seqio_registry
  return seqio_registry


def load(
  name: str | Provider, module: str | Sequence[str] | None = None
) -> Provider:
  """Imports MIXTURE_OR_TASK_MODULE and returns the task or mixture `name`.

  Where it is not registered then, ptune's own tasks are. A task is returned as
  it is.

  Raises:
    UserError: A module does not exist, or no task or mixture has this name.
  """
  if isinstance(name, TextTask) or hasattr(name, 'output_features'):
    return name
  if not isinstance(name, str):
    raise UserError(
      f'MIXTURE_OR_TASK_NAME is {name!r}; it must be a name, such as'
      " 'glue_sst2_v200'"
    )
  return _seqio().load(name, module)


def rows_of(
  task: Provider,
  feature_lengths: Mapping[str, int],
  split: str,
  use_cached: bool,
  seed: int,
) -> 'TextRows | SeqioRows':
  """What reads a task's training rows as token ids."""
  if isinstance(task, TextTask):
    return TextRows(task, feature_lengths, split)
  with quiet_stderr():
    from ptune.data import seqio_rows
  return seqio_rows.SeqioRows(task, feature_lengths, split, use_cached, seed)


def check(
  task: Provider,
  feature_lengths: Mapping[str, int],
  split: str | None,
  use_cached: bool = False,
) -> None:
  """Raises a UserError that lists all that keeps T5 from reading a task.

  Without a split, only that it can encode texts from elsewhere is checked.
  """
  if not isinstance(feature_lengths, Mapping):
    raise UserError(
      f'TASK_FEATURE_LENGTHS is {feature_lengths!r}, expected the lengths by '
      "feature, such as {'inputs': 128, 'targets': 8}."
    )
  wrong, has = [], ', '.join(FEATURES)
  if not isinstance(task, TextTask):
    wrong = _seqio().problems(task, split, use_cached)
    has = ', '.join(task.output_features)
  for name in FEATURES:
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
  if not wrong:
    wrong = _labels_that_are_cut(task, feature_lengths['targets'])
  if wrong:
    raise UserError(f'Task {task.name!r}: ' + '; '.join(wrong) + '.')


def _labels_that_are_cut(task: Provider, length: int) -> list[str]:
  """What is wrong with labels: none may be cut, or be as another is written."""
  if isinstance(task, TextTask):
    postprocessors = [task.postprocess_fn]
  else:
    postprocessors = _seqio().postprocessors(task)
  wrong = []
  for ids in filter(None, map(labels_lib.of, postprocessors)):
    assert ids.written  # Raises if two are the same.
    wrong += [labels_lib.cut(ids.labels, ids.vocabulary(), length)]
  return sorted(set(filter(None, wrong)))


def vocabulary(task: Provider) -> Vocabulary:
  """Returns the one vocabulary of a task's inputs and targets.

  Raises:
    UserError: They differ; T5 has one embedding for both.
  """
  if isinstance(task, TextTask):
    return task.vocabulary
  return _seqio().vocabulary(task)


def eos_id(task: Provider) -> int | None:
  """The id that ends targets, if there is one."""
  if isinstance(task, TextTask):
    return task.vocabulary.eos_id
  return task.output_features['targets'].vocabulary.eos_id


def check_vocabulary(
  task: Provider,
  embedding_rows: int,
  ids: TokenIds = TokenIds(),
  base: epath.PathLike | None = None,
) -> None:
  """Raises a ValueError if a task has another vocabulary than a model.

  Args:
    task: The task. It may have fewer ids than there are rows: T5 has 32,100
      pieces and 32,128 rows.
    embedding_rows: Rows of the model's embedding.
    ids: The model's special tokens.
    base: The base model; a vocabulary that lies with it must be the task's.
  """
  own = vocabulary(task)
  if not isinstance(task, TextTask):
    _seqio().read_vocabulary(task)
  if base is not None:
    check_same(own, base)
  if own.eos_id is not None and ids.eos not in (-1, own.eos_id):
    raise UserError(
      f'Task {task.name!r} ends texts with the token {own.eos_id}, and the'
      f' model with {ids.eos} (its special tokens: {ids}). Use the vocabulary'
      ' that the model was trained with (VOCABULARY), or set sizes.t5.ids to'
      ' what the model was trained with.'
    )
  if own.unk_id == ids.pad:
    logging.warning(
      'Task %r writes what it does not know as the token %d, which is the'
      " model's padding: it is not read.",
      task.name,
      own.unk_id,
    )
  size = own.vocab_size
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
  ids: TokenIds = TokenIds(),
) -> Iterator[tuple[dict[str, str], Batch]]:
  """Yields what a split holds, in order: its texts, and its model features.

  Texts are `inputs` and `targets`, as they were before tokenisation.
  """
  check(task, feature_lengths, split, use_cached)
  if isinstance(task, TextTask):
    for example in task.examples(split):
      texts = {name: example[name] for name in FEATURES}
      yield encode(task, feature_lengths, texts, ids)
    return
  for texts, tokens in _seqio().examples(
    task, feature_lengths, split, use_cached
  ):
    yield texts, model_features(tokens['inputs'], tokens['targets'], ids)


def encode(
  task: Provider,
  feature_lengths: Mapping[str, int],
  texts: Mapping[str, str],
  ids: TokenIds = TokenIds(),
) -> tuple[dict[str, str], Batch]:
  """The same for texts from elsewhere, tokenised as the task's features are."""
  vocab = vocabulary(task)
  tokens_of = {}
  for name in FEATURES:
    limit = feature_lengths[name]
    add_eos = isinstance(task, TextTask) or task.output_features[name].add_eos
    tokens = vocab.encode(texts.get(name, ''))
    room = limit - int(add_eos)
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
    tokens = list(tokens[:room]) + [vocab.eos_id] * int(add_eos)
    tokens_of[name] = np.array(tokens, np.int32)
  return dict(texts), model_features(**tokens_of, ids=ids)


def tokenised(
  vocabulary: Vocabulary,
  feature_lengths: Mapping[str, int],
  text: str,
  ids: TokenIds = TokenIds(),
) -> Batch:
  """Model features of an input that is no task's, which ends with EOS."""
  tokens = vocabulary.encode(text)[: feature_lengths['inputs'] - 1]
  inputs = np.array([*tokens, vocabulary.eos_id], np.int32)
  targets = np.array([vocabulary.eos_id], np.int32)
  return model_features(inputs, targets, ids)


def shifted(targets: np.ndarray, start: int) -> np.ndarray:
  """What the decoder reads to say [..., length]: [a, b, c] -> [start, a, b]."""
  before = [(0, 0)] * (targets.ndim - 1) + [(1, 0)]
  return np.pad(targets, before, constant_values=start)[..., :-1]


def model_features(
  inputs: np.ndarray, targets: np.ndarray, ids: TokenIds = TokenIds()
) -> Batch:
  """One example's features, as EncDecFeatureConverter makes them, unpadded."""
  if ids.has_own_start and targets[:1].tolist() == [ids.start]:
    targets = targets[1:]
  return {
    'encoder_input_tokens': inputs,
    'decoder_target_tokens': targets,
    'decoder_input_tokens': shifted(targets, ids.start),
    'decoder_loss_weights': np.ones_like(targets),
  }


def text_ids(
  text: str | None,
  mixture_or_task_name: str | Provider,
  mixture_or_task_module: str | Sequence[str] | None = None,
  file: str | os.PathLike[str] | None = None,
) -> tuple[int, ...]:
  """The pieces of a text in a task's vocabulary, without EOS.

  Args:
    text: The text.
    mixture_or_task_name: The task.
    mixture_or_task_module: Imported first; registers it.
    file: A file of UTF-8 that holds it, in place of `text`.

  Raises:
    ValueError: If not one of the two is given.
  """
  if (text is None) == (file is None):
    raise UserError(
      'give CONTEXT, a text, or CONTEXT_FILE, a file that holds it'
    )
  if text is None:
    path = paths.check_file(file or '', 'CONTEXT_FILE')
    text = epath.Path(path).read_text()
  task = load(mixture_or_task_name, mixture_or_task_module)
  return tuple(vocabulary(task).encode(text))


def target_ids(
  labels: Sequence[str] | None,
  task_feature_lengths: Mapping[str, int],
  mixture_or_task_name: str | Provider,
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
  length = task_feature_lengths['targets']
  if problem := labels_lib.cut(labels, vocabulary(task), length):
    raise UserError(f'CLASS_LABELS: {problem}')
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
  if isinstance(task, TextTask) and task.labels:
    return sorted(task.labels)
  found: set[str] = set()
  rows = examples(task, feature_lengths, 'train', use_cached)
  for texts, _ in itertools.islice(rows, LABELLED_ROWS):
    if texts['targets'] != UNLABELLED:
      found.add(texts['targets'])
    if len(found) > most:
      raise UserError(
        f'Task {task.name!r} has more than {most} distinct targets, such as '
        f'{sorted(found)[:3]}, so its class labels cannot be told. Set '
        'CLASS_LABELS, or choose another file of prompts/.'
      )
  return sorted(found)
