"""How a run stops: when it is asked to, and when it can not go on."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ptune import checkpoints


@contextlib.contextmanager
def signals() -> Iterator[list[str]]:
  """Notes SIGTERM and Ctrl-C, to be acted on between two steps.

  Once one has come, Ctrl-C ends the process where it stands.
  """
  received: list[str] = []
  if threading.current_thread() is not threading.main_thread():
    yield received
    return

  def note(number, frame):
    del frame
    received.append(signal.Signals(number).name)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Not by logging: the signal may have come in the middle of that. The code
    # shows the cursor, which the progress bar hides.
    cursor = '\x1b[?25h' if os.isatty(2) else ''
    text = f'{cursor}{received[-1]}: saving; Ctrl-C leaves at once\n'
    os.write(2, text.encode())

  before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def asked(received: Sequence[str], step: int = 0) -> bool:
  """Whether to stop: every process does, or none."""
  if jax.process_count() == 1:
    return bool(received)
  if step % 10:  # Asking the others takes time.
    return False
  everyone = multihost_utils.process_allgather(np.array(bool(received)))
  return bool(np.any(everyone))


@contextlib.contextmanager
def explained(directory: epath.Path) -> Iterator[None]:
  """Says what to do about a full disk, whoever ran into it."""
  try:
    yield
  except Exception as error:
    # Orbax, TensorStore and TensorFlow each have an exception of their own.
    full = ('No space left on device', 'Disk quota exceeded')
    if not any(text in f'{error} {error.__cause__}' for text in full):
      raise
    steps = checkpoints.finished_steps(directory / 'checkpoints')
    raise OSError(
      f'no space is left for {directory}. '
      + (
        f'Its checkpoint of step {steps[-1]} is whole'
        if steps
        else 'It holds no checkpoint yet'
      )
      + ': free space, and start the same command again, which goes on from'
      f' {"there" if steps else "the beginning"}'
    ) from error
