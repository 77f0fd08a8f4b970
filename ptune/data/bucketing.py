"""Buckets: batches of rows of similar length, padded to rounded lengths."""

import itertools
from collections.abc import Sequence

import numpy as np

BUCKET_MULTIPLE = 32


def round_up(length, multiple: int | None, limit: int, finely: bool = False):
  """Rounds lengths up to a multiple, at most to `limit`.

  Args:
    length: A length or an array of lengths.
    multiple: The multiple; None or 0 rounds every length up to `limit`.
    limit: The largest result.
    finely: Whether to round a short length only to half of the multiple, a
      quarter of it and so on, but at least to 4.
  """
  if not multiple:
    return np.full_like(length, limit)
  rounded = np.maximum(-(-length // multiple), 1) * multiple
  while finely and multiple >= 8 and multiple % 2 == 0:
    multiple //= 2
    rounded = np.where(length <= multiple, multiple, rounded)
  return np.minimum(rounded, limit)


def bucket(
  lengths: Sequence[np.ndarray],
  head: int,
  batch_size: int,
  window: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """Reorders rows so that batches hold rows of similar length.

  With input lengths, batches of 2, a head of 1 and one window:
      before  5 | 7 2 | 8 1 | 2 7 | 3
      after   5 | 2 7 | 1 2 | 7 8 | 3

  Args:
    lengths: The rounded lengths of the inputs [rows] and of the targets [rows].
      Rows are sorted by inputs, then by targets. Ties keep their random order.
    head: The number of rows at the start that complete the previous batch. They
      keep their places, as do the rows at the end that begin the next batch.
    batch_size: The rows in a batch.
    window: The number of batches whose rows are sorted together. The batches of
      a window are in random order.
    rng: Draws that order.

  Returns:
    [rows] A permutation of the rows.
  """
  inputs, targets = lengths
  order = np.arange(len(inputs))
  batches = max(0, len(order) - head) // batch_size
  # Windows of equal size, because a short window would sort badly.
  windows = max(1, -(-batches // window))
  edges = [head + batches * i // windows * batch_size for i in range(windows)]
  for start, stop in itertools.pairwise([*edges, head + batches * batch_size]):
    rows = np.lexsort((targets[start:stop], inputs[start:stop]))
    rows = rng.permutation(start + rows.reshape(-1, batch_size))
    order[start:stop] = rows.ravel()
  return order
