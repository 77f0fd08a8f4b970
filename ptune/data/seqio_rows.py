"""The token ids of SeqIO tasks' rows.

Only this module, `seqio_registry` and `ptune.tasks` import SeqIO and TensorFlow
to read rows.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from ptune.data.seqio_registry import FEATURES, Provider
from ptune.errors import UserError
from ptune.model.sizes import TokenIds
from ptune.tasks.metrics import UNLABELLED

# After seqio_registry, which quiets TensorFlow.
import seqio  # isort: skip
import tensorflow as tf  # isort: skip

# The most rows to keep in memory: 2M rows of 128 + 4 int32 tokens are 1 GB. If
# a source does not tell its size, we read up to the second limit to find out.
MAX_ROWS = 2_000_000
MAX_UNCOUNTED_ROWS = 100_000
_TRIMMED = '_trimmed'  # suffix of the features that mark trimming


def _mark_trimmed(dataset, sequence_length, output_features, before_eos):
  """A preprocessor that marks examples which the next step will trim."""

  def mark(example):
    marks = {}
    for name in FEATURES:
      eos = int(before_eos and output_features[name].add_eos)
      too_long = tf.size(example[name]) > sequence_length[name] - eos
      marks[name + _TRIMMED] = too_long
    return {**example, **marks}

  return dataset.map(mark, num_parallel_calls=tf.data.AUTOTUNE)


def _marked(task: Provider) -> Provider:
  """Returns a copy of a task whose examples say whether they were trimmed.

  Examples are trimmed by `append_eos_after_trim`, the last preprocessor of most
  tasks, and by SeqIO itself after the last preprocessor. If another
  preprocessor cuts examples (chunks, span corruption), we do not mark them.
  """
  marked = copy.copy(task)
  if isinstance(task, seqio.Mixture):
    marks = {name + _TRIMMED for name in FEATURES}
    marked.get_task_dataset = lambda part, keys, *args: task.get_task_dataset(
      _marked(part), keys | marks, *args
    )
    return marked
  steps = list(task.preprocessors)
  last = getattr(steps[-1], 'func', steps[-1]) if steps else None
  eos = last is seqio.preprocessors.append_eos_after_trim
  mark = functools.partial(_mark_trimmed, before_eos=eos)
  steps.insert(len(steps) - eos, mark)
  # This hides the class's cached property. Task.replace would lose subclasses.
  marked.preprocessors = tuple(steps)
  return marked


def _is_row(
  tokens: np.ndarray, lengths: np.ndarray, wanted: Sequence[int]
) -> np.ndarray:
  """Which of the padded rows [rows, longest] equal one row of tokens."""
  size = len(wanted)
  if not size or tokens.shape[1] < size:
    return np.zeros(len(tokens), bool)
  return (lengths == size) & np.all(tokens[:, :size] == wanted, axis=1)


class SeqioRows:
  """The token ids of a SeqIO task's training rows."""

  def __init__(
    self,
    task: Provider,
    feature_lengths: Mapping[str, int],
    split: str,
    use_cached: bool,
    seed: int,
  ):
    """Stores the arguments, see `data.Batches`; reads nothing."""
    self._task, self._lengths = task, feature_lengths
    self._split, self._use_cached, self._seed = split, use_cached, seed

  def limit(self, in_memory: bool | None) -> float:
    """The most rows to keep in memory; 0 for a stream."""
    task = self._task
    if isinstance(task, seqio.Mixture):
      if in_memory:
        raise UserError(
          f'in_memory is True for the mixture {task.name!r}, expected a task:'
          ' a mixture has no epochs. Leave in_memory out.'
        )
      return 0
    if in_memory is not None:
      return math.inf if in_memory else 0
    if self._use_cached and task.supports_caching:
      rows = task.get_cached_stats(self._split)['examples']
    else:
      rows = task.num_input_examples(self._split)
    if rows is None:
      return MAX_UNCOUNTED_ROWS
    return MAX_ROWS if rows <= MAX_ROWS else 0

  def read(self, rows: int) -> Iterator[dict[str, np.ndarray]]:
    """Reads the task once and in order, in blocks of `rows` rows.

    Rows without a label are left out; the log tells how many.

    Yields:
      For each feature f: the trimmed tokens f [rows, longest], their number
      f_length [rows], and whether they were trimmed, f_trimmed [rows].
    """
    left_out, none = 0, self._no_label()
    for block in self._dataset(rows, False, 1).as_numpy_iterator():
      without = _is_row(block['targets'], block['targets_length'], none)
      left_out += int(without.sum())
      yield {name: values[~without] for name, values in block.items()}
    if left_out:
      logging.warning(
        '%s:%s: %d rows have no label, and are not trained on.',
        self._task.name,
        self._split,
        left_out,
      )

  def _no_label(self) -> list[int]:
    """The target tokens that mean "no label"; [] if there are none."""
    feature = self._task.output_features['targets']
    ids = list(feature.vocabulary.encode(UNLABELLED))
    if not all(isinstance(i, int) for i in ids):  # No vocabulary of texts.
      return []
    ids += [feature.vocabulary.eos_id] * int(feature.add_eos)
    return ids if len(ids) <= self._lengths['targets'] else []

  def versions(self) -> dict[str, str]:
    """The versions that a saved position depends on."""
    return {'seqio': seqio.__version__, 'tensorflow': tf.__version__}

  def stream(self, rows: int) -> 'Stream':
    """Reads the task forever, shuffled, in blocks of `rows` rows."""
    none = self._no_label()

    def has_label(row):
      if not none:
        return True
      targets = row['targets']
      return tf.size(targets) != len(none) or tf.reduce_any(targets != none)

    return Stream(self._dataset(rows, True, None, has_label))

  def _dataset(
    self,
    rows: int,
    shuffle: bool,
    num_epochs: int | None,
    wanted: Callable[[Any], Any] | None = None,
  ) -> tf.data.Dataset:
    def trim(example):
      row = {}
      for name in FEATURES:
        length, limit = tf.size(example[name]), self._lengths[name]
        row[name] = example[name][:limit]
        row[name + '_length'] = tf.minimum(length, limit)
        row[name + _TRIMMED] = example[name + _TRIMMED] | (length > limit)
      return row

    dataset = _marked(self._task).get_dataset(
      self._lengths,
      self._split,
      trim_output_features=False,
      use_cached=self._use_cached,
      seed=self._seed,
      shuffle=shuffle,
      num_epochs=num_epochs,
    )
    dataset = dataset.map(trim, num_parallel_calls=tf.data.AUTOTUNE)
    if wanted is not None:
      dataset = dataset.filter(wanted)
    options = tf.data.Options()
    options.deterministic = True
    return dataset.padded_batch(rows).with_options(options).prefetch(2)

  def trimmed(self, count: int | None) -> dict[str, int]:
    """Counts the rows, out of the first `count`, that are trimmed."""
    found, left = dict.fromkeys(FEATURES, 0), count or math.inf
    for block in self.read(1024):
      rows = int(min(left, len(block['inputs'])))
      for name in FEATURES:
        found[name] += int(block[name + _TRIMMED][:rows].sum())
      left -= rows
      if left <= 0:
        break
    return found


class FeatureConverter(seqio.EncDecFeatureConverter):
  """SeqIO's converter without packing, for any pad and start tokens."""

  def __init__(self, ids: TokenIds):
    super().__init__(pack=False, bos_id=ids.start)
    self._pad = ids.pad
    self._start = ids.start if ids.has_own_start else None

  def _convert_features(self, ds, task_feature_lengths):
    """Pads first, so that SeqIO finds nothing to pad with its 0."""

    def read(example, name):
      tokens = example[name]
      if name == 'targets' and self._start is not None:
        begins = tf.reduce_all(tokens[:1] == self._start)
        tokens = tokens[tf.cast(begins, tf.int32) :]
      return tokens

    def padded(example):
      example = {name: read(example, name) for name in task_feature_lengths}
      return {
        name: tf.pad(
          example[name][:length],
          [[0, length - tf.minimum(tf.size(example[name]), length)]],
          constant_values=self._pad,
        )
        for name, length in task_feature_lengths.items()
      }

    return super()._convert_features(ds.map(padded), task_feature_lengths)

  def _convert_example(self, features):
    example = dict(super()._convert_example(features))
    targets = features['targets']
    # SeqIO gives token 0 no weight, even if it is not the padding.
    example['decoder_loss_weights'] = tf.cast(targets != self._pad, tf.int32)
    return example


class Stream:
  """An endless iterator over blocks of rows; see `SeqioRows.read`.

  Its position can be saved to files and restored with the same task and the
  same versions of SeqIO and TensorFlow.
  """

  def __init__(self, dataset: tf.data.Dataset):
    """Starts at the first row."""
    self._iterator = iter(dataset)
    self._checkpoint = tf.train.Checkpoint(iterator=self._iterator)

  def __iter__(self) -> 'Stream':
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    return {name: x.numpy() for name, x in next(self._iterator).items()}

  def save(self, prefix: str) -> None:
    """Saves the position to files whose names begin with a prefix."""
    self._checkpoint.write(prefix)

  def restore(self, prefix: str) -> None:
    """Goes to a saved position.

    Raises:
      OSError, tf.errors.OpError: If it cannot be read.
    """
    self._checkpoint.read(prefix).assert_consumed()
