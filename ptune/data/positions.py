"""Where the windows of a stream begin, kept on disk to resume from.

A stream has no index: SeqIO shuffles and mixes it as it comes. To start at a
window without reading all rows before it, the state of the reading (shuffle
buffers, and how far each file was read) is kept at the start of windows:

    <directory>/<window>/    state.*, and key.json: which stream it is of

Of n windows about 2 log2(n) are kept, the more the newer. So a run that
resumes at an earlier window reads again at most as many rows as it had read
since then, and as many more. A state takes about as much room as the rows in
SeqIO's shuffle buffers, 1,000 of each task, and writing one takes
milliseconds.
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
  """The kept positions of one stream. On gs:// none are kept."""

  def __init__(self, directory: os.PathLike[str] | str, key: Mapping[str, Any]):
    """Nothing is made yet.

    Args:
      directory: Where they are kept.
      key: All that a position depends on; those of another key are not used.
    """
    self._directory = storage.local(directory)
    self._key = json.loads(json.dumps(key))

  def newest_first(self) -> Iterator[tuple[int, str, Any]]:
    """Yields what is kept, the last window first.

    Yields:
      The window, the prefix of its state's files, and its `facts`.
    """
    for window in sorted(self._kept(), reverse=True):
      folder = os.path.join(self._directory or '', str(window))
      found = self._read(folder)
      if found is not None:
        yield window, os.path.join(folder, STATE), found['facts']

  def keep(
    self, window: int, save: Callable[[str], None], facts: Any = None
  ) -> None:
    """Keeps the position at the start of a window, and thins out older ones.

    Args:
      window: Its number.
      save: Writes the state to files with a prefix.
      facts: What else is to be known there, as JSON has it.
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
      for old in too_many([w for w in self._kept() if w <= window], window):
        shutil.rmtree(os.path.join(self._directory, str(old)))
    except Exception as error:  # A source that cannot be kept, a full disk.
      shutil.rmtree(partial, ignore_errors=True)
      self._directory = None
      logging.info(
        'positions of the stream are not kept, so resuming reads it from the'
        ' start: %.300s',
        error,
      )

  def _kept(self) -> list[int]:
    if self._directory is None or not os.path.isdir(self._directory):
      return []
    return [int(n) for n in os.listdir(self._directory) if n.isdecimal()]

  def _read(self, folder: str) -> dict[str, Any] | None:
    """The key and the facts of a position, None of another stream."""
    try:
      with open(os.path.join(folder, KEY)) as f:
        found = json.load(f)
    except (OSError, ValueError):
      return None
    return found if found['key'] == self._key else None


def too_many(kept: list[int], newest: int) -> list[int]:
  """Which positions can go: two are kept of each age from 2^k to 2^(k+1)."""
  by_age: dict[int, list[int]] = {}
  for window in sorted(kept):
    by_age.setdefault((newest - window + 1).bit_length(), []).append(window)
  return [window for some in by_age.values() for window in some[1:-1]]
