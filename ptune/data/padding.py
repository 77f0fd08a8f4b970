"""Padded batches that hold every row once, for evaluation and prediction."""

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

  With a bucket_multiple, the longest inputs come first, so that a batch that
  does not fit in memory fails at once. Inputs are padded to the longest of the
  batch, rounded up. The decoder's features keep the length of the longest
  example, so that they do not reveal the length of a row's targets.

  Args:
    examples: Model features, 1-D, padded or not.
    batch_size: The rows in each batch. The last batch is filled by repeating
      its last example: decoding then ends no later. These rows have loss
      weights of 0, so that sums over tokens are right.
    bucket_multiple: See `Batches`; None or 0 keeps the order and the lengths.
    pad: The token that rows are padded with.

  Yields:
    The numbers of the examples in the first rows, [n <= batch_size], and the
    batch.
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
  """Repeats the last number: [4, 5] and a batch of 4 -> [4, 5, 5, 5]."""
  return np.pad(rows, (0, batch_size - len(rows)), 'edge')


def filled_up(
  rows: Iterable[np.ndarray], length: int, name: str, pad: int
) -> np.ndarray:
  """Pads the rows of a feature and stacks them: [rows, length].

  Args:
    rows: The rows, each at most `length` long.
    length: The length of the result.
    name: The feature. Tokens are padded with `pad`, others with 0.
    pad: The token that rows are padded with.
  """
  value = pad if name.endswith('_tokens') else 0
  rows = list(rows)
  filled = np.full((len(rows), length), value, rows[0].dtype)
  for to, row in zip(filled, rows, strict=True):
    to[: len(row)] = row
  return filled


def eval_batches(
  dataset: Any,
  batch_size: int,
  bucket_multiple: int | None = BUCKET_MULTIPLE,
  pad: int = 0,
) -> Iterator[tuple[np.ndarray, Batch]]:
  """Yields the batches of a data set of model features; see `padded_batches`.

  Args:
    dataset: Pairs of an index and model features. Or a TensorFlow data set: if
      it is not enumerated (as seqio.Evaluator's are), indices count from 0.
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
