"""The token ids of a user's own rows."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from absl import logging

from ptune.errors import UserError, some
from ptune.tasks.texts import TextTask


class TextRows:
  """The training rows of a `TextTask`, in the form of `SeqioRows`."""

  def __init__(
    self, task: TextTask, feature_lengths: Mapping[str, int], split: str
  ):
    """Stores the arguments; `read` tokenises the texts."""
    self._task, self._lengths, self._split = task, feature_lengths, split

  def limit(self, in_memory: bool | None) -> float:
    """No limit: the texts are in memory already."""
    del in_memory
    return float('inf')

  def read(self, rows: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields blocks of the rows that have a label, in the order of the texts.

    Args:
      rows: The number of rows in a block.

    Raises:
      UserError: If no row has a label.
    """
    task = self._task
    inputs, targets, unlabelled = task.training(self._split)
    if unlabelled:
      logging.warning(
        '%s:%s: %d of %d rows have no label, and are not trained on.',
        task.name,
        self._split,
        unlabelled,
        unlabelled + len(inputs),
      )
    if unlabelled and not inputs:
      raise UserError(
        f'{task.name}:{self._split}: none of the {unlabelled} rows has a label,'
        ' expected one to train on'
      )
    found = set(targets)
    if absent := [repr(x) for x in task.labels or () if x not in found]:
      logging.warning(
        '%s:%s: no row has the label %s.', task.name, self._split, some(absent)
      )
    for start in range(0, len(inputs), rows):
      stop = start + rows
      block = self._block('inputs', inputs[start:stop])
      yield block | self._block('targets', targets[start:stop])

  def _block(self, name: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
    vocab, room = self._task.vocabulary, self._lengths[name] - 1
    ids = [vocab.encode(text) for text in texts]
    lengths = np.array([len(row) for row in ids])
    kept = np.minimum(lengths, room) + 1
    tokens = np.zeros((len(ids), kept.max()), np.int32)
    for row, of, length in zip(tokens, ids, kept, strict=True):
      row[: length - 1] = of[: length - 1]
      row[length - 1] = vocab.eos_id
    return {
      name: tokens,
      f'{name}_length': kept,
      f'{name}_trimmed': lengths > room,
    }
