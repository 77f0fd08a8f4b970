"""Evaluation and prediction: every row once, in batches of one size."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ptune.data.bucketing import BUCKET_MULTIPLE, round_up
from ptune.data.seqio_task import Batch
from ptune.errors import UserError


def padded_batches(
  examples: Iterable[Mapping[str, np.ndarray]],
  batch_size: int,
  bucket_multiple: int | None = BUCKET_MULTIPLE,
  pad: int = 0,
) -> Iterator[tuple[np.ndarray, Batch]]:
  """Yields every example exactly once, in batches of one size.

  With a multiple, the longest inputs come first (what does not fit in memory
  fails at once), and inputs are cut to the batch's longest, rounded up. What
  the decoder reads keeps its length, which must not tell that of the targets.

  Args:
    examples: Model features, 1-D, padded or not.
    batch_size: Rows in each batch. The last one is filled up by repeating its
      last example, so that decoding ends as early as without, with loss
      weights of 0, so that sums over tokens are right.
    bucket_multiple: As for `Batches`; None or 0 keeps order and length.
    pad: The token that rows are padded with.

  Yields:
    Which examples the first rows hold [n <= batch_size], and the batch.
  """
  if batch_size < 1:
    raise UserError(f'The batch size is {batch_size}, expected at least 1.')
  examples = list(examples)
  longest = {
    name: max(len(example[name]) for example in examples)
    for name in (examples[0] if examples else ())
  }
  tokens = (np.flatnonzero(e['encoder_input_tokens'] != pad) for e in examples)
  lengths = np.array([t[-1] + 1 if len(t) else 0 for t in tokens])
  order = np.arange(len(examples))
  if bucket_multiple:
    order = np.argsort(-lengths, kind='stable')
  for start in range(0, len(examples), batch_size):
    which = order[start : start + batch_size]
    numbers = repeat_last(which, batch_size)
    limit = longest['encoder_input_tokens']
    cut = round_up(lengths[which].max(), bucket_multiple, limit)
    batch = {}
    for name, length in {**longest, 'encoder_input_tokens': cut}.items():
      rows = [examples[i][name][:length] for i in numbers]
      batch[name] = filled_up(rows, length, name, pad)
    batch['decoder_loss_weights'][len(which) :] = 0
    yield which, batch


def repeat_last(rows: np.ndarray, batch_size: int) -> np.ndarray:
  """The numbers of a batch's rows: after the last, it stands again.

  [4, 5], 4 -> [4, 5, 5, 5]
  """
  return np.pad(rows, (0, batch_size - len(rows)), 'edge')


def filled_up(
  rows: Iterable[np.ndarray], length: int, name: str, pad: int
) -> np.ndarray:
  """Rows of a feature as one array [rows, length].

  Args:
    rows: [at most length] each.
    length: Of what is returned.
    name: The feature; tokens are filled up with `pad`, weights and segments
      with 0.
    pad: The token that rows are padded with.
  """
  value = pad if name.endswith('_tokens') else 0
  return np.stack(
    [np.pad(row, (0, length - len(row)), constant_values=value) for row in rows]
  )


def eval_batches(
  dataset: Any,
  batch_size: int,
  bucket_multiple: int | None = BUCKET_MULTIPLE,
  pad: int = 0,
) -> Iterator[tuple[np.ndarray, Batch]]:
  """Yields a data set of model features as `padded_batches` does.

  Args:
    dataset: Pairs of an index and model features; or a data set of TensorFlow,
      enumerated (as seqio.Evaluator's are) or not: then its indices count the
      examples from 0.
    batch_size: See `padded_batches`.
    bucket_multiple: See `padded_batches`.
  """
  pairs = dataset
  if not isinstance(dataset, Sequence):
    if not isinstance(dataset.element_spec, tuple):
      dataset = dataset.enumerate()
    pairs = dataset.as_numpy_iterator()
  indices, examples = [], []
  for index, example in pairs:
    indices.append(index)
    examples.append(example)
  for which, batch in padded_batches(
    examples, batch_size, bucket_multiple, pad
  ):
    yield np.array(indices)[which], batch
