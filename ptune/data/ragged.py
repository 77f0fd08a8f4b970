"""Rows of different lengths, held as one array."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Ragged(NamedTuple):
  """Rows of different lengths: row i is values[starts[i]:starts[i + 1]]."""

  values: np.ndarray  # [tokens] int32
  starts: np.ndarray  # [rows + 1] int64

  def lengths(self, which=slice(None)) -> np.ndarray:
    return self.starts[1:][which] - self.starts[:-1][which]

  def row(self, index: int) -> np.ndarray:
    return self.values[self.starts[index] : self.starts[index + 1]]

  def padded(self, which: np.ndarray, length: int, pad: int) -> np.ndarray:
    """The rows `which`, padded: [len(which), length]."""
    padded = np.full((len(which), length), pad, np.int32)
    for i, index in enumerate(which):
      tokens = self.row(index)
      padded[i, : len(tokens)] = tokens
    return padded


def join(blocks: Sequence[Mapping[str, np.ndarray]], name: str) -> Ragged:
  """Joins blocks of padded rows; see `seqio_rows.SeqioRows.read`."""
  values, lengths = [], [block[name + '_length'] for block in blocks]
  for block, length in zip(blocks, lengths, strict=True):
    tokens = block[name]
    values.append(tokens[np.arange(tokens.shape[1]) < length[:, None]])
  starts = np.cumsum(np.concatenate([[0], *lengths]))
  return Ragged(np.concatenate(values), starts)


def without_start(rows: Ragged, start: int) -> Ragged:
  """Drops the token `start` from rows that begin with it."""
  first = rows.starts[:-1][rows.lengths() > 0]
  kept = np.ones(len(rows.values), bool)
  kept[first] = rows.values[first] != start
  before = np.concatenate([[0], np.cumsum(kept)])
  return Ragged(rows.values[kept], before[rows.starts])
