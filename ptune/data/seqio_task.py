"""A task: how to find, check and read it, with or without SeqIO.

A task is a user's own `texts.TextTask`, which needs no TensorFlow, or a SeqIO
task or mixture, which `seqio_registry` and `seqio_rows` read.
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging
from etils import epath

from ptune.config import flags
from ptune.convert.pieces import Vocabulary
from ptune.convert.vocabulary import check_same
from ptune.data.text_rows import TextRows
from ptune.errors import UserError
from ptune.host import paths
from ptune.host.quiet import quiet_stderr
from ptune.methods import prompt_init
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
# The number of rows in which we look for all labels of a task.
LABELLED_ROWS = 100_000

Batch = dict[str, np.ndarray]


def _seqio() -> Any:
  """The module that imports SeqIO and TensorFlow."""
  with quiet_stderr():
    from ptune.data import seqio_registry
  return seqio_registry


def load(
  name: str | Provider, module: str | Sequence[str] | None = None
) -> Provider:
  """Imports MIXTURE_OR_TASK_MODULE and returns the task or mixture `name`.

  If the name is still unknown, ptune registers its own tasks. If `name` is a
  task already, it is returned.

  Raises:
    UserError: If a module does not exist, or no task or mixture has this name.
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
  """The reader of a task's training rows."""
  if isinstance(task, TextTask):
    return TextRows(task, feature_lengths, split)
  with quiet_stderr():
    from ptune.data import seqio_rows
  return seqio_rows.SeqioRows(task, feature_lengths, split, use_cached, seed)


def splits(
  task: Provider, split: str | None = None, use_cached: bool = False
) -> list[str]:
  """The splits of a task, sorted.

  Args:
    task: The task. If it reads TFDS, its data may have to be downloaded.
    split: If it is among them, its rows are downloaded too.
    use_cached: USE_CACHED_TASKS.

  Raises:
    UserError: If the data cannot be reached.
  """
  if isinstance(task, TextTask):
    return sorted(task.splits)
  return _seqio().splits(task, split, use_cached)


def check(
  task: Provider,
  feature_lengths: Mapping[str, int],
  split: str | None,
  use_cached: bool = False,
) -> None:
  """Raises a UserError that lists every reason why T5 cannot read a task.

  Downloads the data of a task that reads TFDS, if it is not on this machine.
  If `split` is None, only checks that the task can encode other texts.
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
  if split is not None:
    there = splits(task, split, use_cached)
    own = isinstance(task, TextTask) and split in flags.SPLITS
    if split not in there:
      wrong.append(
        f'no split {split!r}; its splits: {", ".join(there)}'
        + (f'. Give its rows as a file: --{split}=FILE' if own else '')
      )
  if not wrong:
    wrong = _labels_that_are_cut(task, feature_lengths['targets'])
  if wrong:
    raise UserError(f'Task {task.name!r}: ' + '; '.join(wrong) + '.')


def _labels_that_are_cut(task: Provider, length: int) -> list[str]:
  """Lists labels that are trimmed; raises if two have the same tokens."""
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
  """The vocabulary of a task's inputs and targets.

  Raises:
    UserError: If they have different ones, because T5 has one embedding.
  """
  if isinstance(task, TextTask):
    return task.vocabulary
  return _seqio().vocabulary(task)


def eos_id(task: Provider) -> int | None:
  """The token that ends targets; None if there is none."""
  if isinstance(task, TextTask):
    return task.vocabulary.eos_id
  return task.output_features['targets'].vocabulary.eos_id


def check_vocabulary(
  task: Provider,
  embedding_rows: int,
  ids: TokenIds = TokenIds(),
  base: epath.PathLike | None = None,
) -> None:
  """Raises a UserError if a task has another vocabulary than a model.

  Args:
    task: The task. Its vocabulary may be smaller than the embedding: T5 has
      32,100 pieces and 32,128 rows.
    embedding_rows: The rows of the model's embedding.
    ids: The model's special tokens.
    base: The base model. If its directory contains a vocabulary, this must be
      the task's.
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
      ' the tokens that the model was trained with.'
    )
  if own.unk_id == ids.pad:
    logging.warning(
      "Task %r encodes unknown text as the token %d, which is the model's"
      ' padding, so the model does not see it.',
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
  """Yields the texts and the model features of a split's examples, in order.

  The texts are `inputs` and `targets` before tokenisation.
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
  """The texts and model features of other texts, tokenised as the task does."""
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
        'the %s %.40r... have %d tokens and are cut to %d (this is logged for'
        ' the first 3 texts only)',
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
  """The model features of one input without a task; EOS is appended."""
  tokens = vocabulary.encode(text)[: feature_lengths['inputs'] - 1]
  inputs = np.array([*tokens, vocabulary.eos_id], np.int32)
  targets = np.array([vocabulary.eos_id], np.int32)
  return model_features(inputs, targets, ids)


def shifted(targets: np.ndarray, start: int) -> np.ndarray:
  """Decoder inputs of targets [..., length]: [a, b, c] -> [start, a, b]."""
  before = [(0, 0)] * (targets.ndim - 1) + [(1, 0)]
  return np.pad(targets, before, constant_values=start)[..., :-1]


def model_features(
  inputs: np.ndarray, targets: np.ndarray, ids: TokenIds = TokenIds()
) -> Batch:
  """One example's features as in seqio.EncDecFeatureConverter, not padded."""
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
  """The ids of a text's pieces in a task's vocabulary; see `pieces_of`.

  Args:
    text: The text.
    mixture_or_task_name: The task.
    mixture_or_task_module: Imported first; registers it.
    file: A UTF-8 file that holds the text, instead of `text`.

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
  return tuple(prompt_init.pieces_of(text, vocabulary(task)))


def target_ids(
  labels: Sequence[str] | None,
  task_feature_lengths: Mapping[str, int],
  mixture_or_task_name: str | Provider,
  mixture_or_task_module: str | Sequence[str] | None = None,
) -> tuple[tuple[int, ...], ...]:
  """The target's token ids for each class label of a task.

  Args:
    labels: CLASS_LABELS.
    task_feature_lengths: TASK_FEATURE_LENGTHS.
    mixture_or_task_name: The task.
    mixture_or_task_module: Imported first; registers it.

  Raises:
    ValueError: If there are fewer than two labels, or two have the same tokens.
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
      f'some of CLASS_LABELS are the same after trimming to'
      f' TASK_FEATURE_LENGTHS {task_feature_lengths}: {found}; raise targets'
    )
  return tuple(found.values())


def labels(
  task: Provider, feature_lengths: Mapping[str, int], use_cached: bool = False
) -> list[str]:
  """The labels of a classification, as a run asks how likely each of them is.

  Args:
    task: The task. If it is SeqIO's and does not say its labels, they are the
      distinct targets of its training split.
    feature_lengths: TASK_FEATURE_LENGTHS.
    use_cached: USE_CACHED_TASKS.

  Raises:
    UserError: If it has no labels, or they do not fit its feature lengths.
  """
  if isinstance(task, TextTask):
    if not task.labels:
      raise UserError(
        f'Task {task.name!r} has no labels, so there are no labels to classify;'
        ' set LABEL_NAMES, as in --labels=negative,positive'
      )
    return list(task.labels)
  # The tasks of a mixture may have several.
  own = map(labels_lib.of, _seqio().postprocessors(task))
  known = {ids and ids.labels for ids in own}
  if len(known) == 1 and (same := known.pop()):
    return list(same)
  found = distinct_targets(task, feature_lengths, use_cached=use_cached)
  room = feature_lengths['targets']
  if problem := labels_lib.cut(found, vocabulary(task), room):
    raise UserError(f'Task {task.name!r}: {problem}')
  return found


def distinct_targets(
  task: Provider,
  feature_lengths: Mapping[str, int],
  most: int = 100,
  use_cached: bool = False,
) -> list[str]:
  """The labels of a classification task: its distinct targets, sorted.

  Args:
    task: The task. We read at most LABELLED_ROWS rows of its training split.
    feature_lengths: TASK_FEATURE_LENGTHS.
    most: The most labels that a classification may have.
    use_cached: USE_CACHED_TASKS.

  Raises:
    ValueError: If there are more.
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
        f'Task {task.name!r} has more than {most} distinct targets, such as'
        f' {sorted(found)[:3]}, so it is not a classification. Set'
        ' CLASS_LABELS, or choose another file of prompts/.'
      )
  return sorted(found)
