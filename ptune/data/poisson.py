"""Batches that draw each row independently, with the same probability.

This is Poisson sampling, which the accounting of private training assumes when
it counts the gain from sampling. A step draws every row of the task
independently, with probability batch_size / rows, so a batch has batch_size
rows on average. Its arrays have room for a few standard deviations more; empty
places are padding with loss weights of 0. If a step draws more rows, the arrays
have two or more times the room, so no row is ever left out.
"""

import math
from typing import Any

import numpy as np

from ptune.data import batches
from ptune.errors import UserError

# The room of a batch, in standard deviations above its mean.
SPREAD = 4


class PoissonBatches(batches.Batches):
  """The training batches of a task in memory, drawn by `key` and the step.

  Anyone who knows the key knows which rows are in a batch.
  """

  def __init__(self, *args: Any, key: int, multiple: int = 1, **settings: Any):
    """Reads the task.

    Args:
      *args: Arguments of `Batches`.
      key: The key of the draws, at most 64 bits.
      multiple: The number of rows in the arrays is a multiple of this.
      **settings: Further arguments of `Batches`.

    Raises:
      ValueError: See `Batches`. Also if the task is a stream, or has fewer rows
        than a batch.
    """
    super().__init__(*args, **settings)
    if not self.num_examples or self.num_examples < self._batch_size:
      raise UserError(
        f'{self._name} has {self.num_examples or "a stream of"} rows; Poisson'
        ' sampling draws from a task in memory, with at least BATCH_SIZE'
        f' {self._batch_size} rows'
      )
    self._key, mean = key, self._batch_size
    self.chance = mean / self.num_examples
    most = mean + SPREAD * math.sqrt(mean * (1 - self.chance))
    self.room = multiple * math.ceil(most / multiple)

  def drawn(self, step: int) -> np.ndarray:
    """The rows of a step's batch, in order."""
    assert self.num_examples
    key = np.array([self._key, step], np.uint64)
    draw = np.random.Generator(np.random.Philox(key=key))
    return np.flatnonzero(draw.random(self.num_examples) < self.chance)

  def __call__(self, step: int) -> batches.Batch:
    """Returns the batch of a step, as `Batches` does; see the module."""
    which = self.drawn(step)
    empty = -len(which) % self.room if len(which) else self.room
    assert self._rows
    filled = np.concatenate([which, np.zeros(empty, which.dtype)])
    batch = self._batch(self._rows, filled)
    for name, value in batch.items():
      pad = 0 if name == 'decoder_loss_weights' else self._ids.pad
      value[len(which) :] = pad
    return batch
