"""Saved positions in a stream, from which a run resumes.

A stream has no index, because SeqIO shuffles and mixes it while reading. To
start at a window without reading every row before it, we save the reader's
state (shuffle buffers, and the position in each file) at the start of windows:

    <directory>/<window>/    state.*, and key.json, which names the stream

Of n windows we keep about 2 log2(n), most of them recent. If a run resumes at
window w and the newest position is at window n, the closest position before w
is at most about n - w windows before it. A state is about as large as the rows
in SeqIO's shuffle buffers, 1,000 for each task, and takes milliseconds to
write.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import logging

from ptune.convert import storage

STATE, KEY = 'state', 'key.json'


class Positions:
  """The saved positions of one stream; on gs:// none are saved."""

  def __init__(self, directory: os.PathLike[str] | str, key: Mapping[str, Any]):
    """Stores the arguments; `save` makes the directory.

    Args:
      directory: Where to save positions.
      key: Everything that a position depends on. Positions with another key are
        ignored.
    """
    self._directory = storage.local(directory)
    self._key = json.loads(json.dumps(key))

  def newest_first(self) -> Iterator[tuple[int, str, Any]]:
    """Yields the saved positions, beginning with the last window.

    Yields:
      The window, the prefix of its state's files, and its `facts`.
    """
    for window in sorted(self._saved(), reverse=True):
      folder = os.path.join(self._directory or '', str(window))
      found = self._read(folder)
      if found is not None:
        yield window, os.path.join(folder, STATE), found['facts']

  def save(
    self, window: int, save: Callable[[str], None], facts: Any = None
  ) -> None:
    """Saves the position at the start of a window, and deletes some older ones.

    Args:
      window: The number of the window.
      save: Writes the state to files with a given prefix.
      facts: What else to save there: anything that JSON can hold.
    """
    if self._directory is None or window == 0:
      return
    folder = os.path.join(self._directory, str(window))
    if self._read(folder) is not None:
      return
    partial = os.path.join(self._directory, f'.{window}.tmp')
    try:
      for old in (folder, partial):
        shutil.rmtree(old, ignore_errors=True)
      os.makedirs(partial)
      save(os.path.join(partial, STATE))
      with open(os.path.join(partial, KEY), 'w') as f:
        json.dump({'key': self._key, 'facts': facts}, f)
      os.replace(partial, folder)
      for old in too_many([w for w in self._saved() if w <= window], window):
        shutil.rmtree(os.path.join(self._directory, str(old)))
    except Exception as error:  # A source without a state, a full disk, ...
      shutil.rmtree(partial, ignore_errors=True)
      self._directory = None
      logging.info(
        'positions of the stream are not saved, so resuming reads it from the'
        ' start: %.300s',
        error,
      )

  def _saved(self) -> list[int]:
    if self._directory is None or not os.path.isdir(self._directory):
      return []
    return [int(n) for n in os.listdir(self._directory) if n.isdecimal()]

  def _read(self, folder: str) -> dict[str, Any] | None:
    """The key and the facts of a position; None if it has another key."""
    try:
      with open(os.path.join(folder, KEY)) as f:
        found = json.load(f)
    except (OSError, ValueError):
      return None
    return found if found['key'] == self._key else None


def too_many(kept: list[int], newest: int) -> list[int]:
  """The positions to delete: we keep two for each age from 2^k to 2^(k+1)."""
  by_age: dict[int, list[int]] = {}
  for window in sorted(kept):
    by_age.setdefault((newest - window + 1).bit_length(), []).append(window)
  return [window for some in by_age.values() for window in some[1:-1]]
