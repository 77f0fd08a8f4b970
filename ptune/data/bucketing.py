"""Buckets: batches of rows of like length, padded to rounded lengths."""

import itertools
from collections.abc import Sequence

import numpy as np

BUCKET_MULTIPLE = 32


def round_up(length, multiple: int | None, limit: int, finely: bool = False):
  """Rounds up to a multiple, at most `limit`; without one, to `limit`.

  Finely, short ones only to a half of it, a quarter and so on, to 4 at least.
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
  """Reorders rows so that batches hold rows of like length.

  With input lengths, batches of 2, a head of 1 and one window:
      before  5 | 7 2 | 8 1 | 2 7 | 3
      after   5 | 2 7 | 1 2 | 7 8 | 3

  Args:
    lengths: [rows] Rounded lengths of the inputs, and of the targets, by
      which equal inputs are sorted. Ties keep their order, which is random.
    head: Rows at the start that complete the batch before. They stay where
      they are, as do those at the end that begin another batch.
    batch_size: Rows in a batch.
    window: Batches among which rows are sorted. The order of the batches
      within a window is random.
    rng: Draws that order.

  Returns:
    [rows] A permutation of the rows.
  """
  inputs, targets = lengths
  order = np.arange(len(inputs))
  batches = max(0, len(order) - head) // batch_size
  windows = max(1, -(-batches // window))  # of even size: short ones sort badly
  edges = [head + batches * i // windows * batch_size for i in range(windows)]
  for start, stop in itertools.pairwise([*edges, head + batches * batch_size]):
    rows = np.lexsort((targets[start:stop], inputs[start:stop]))
    rows = rng.permutation(start + rows.reshape(-1, batch_size))
    order[start:stop] = rows.ravel()
  return order
