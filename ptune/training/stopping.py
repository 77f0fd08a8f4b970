"""How a run stops: by a signal, or because the disk is full."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ptune.host.files import is_full
from ptune.training import checkpoints

# Seconds between two times at which the processes of a run ask each other.
ASK_EVERY = 5.0


class Asked:
  """Tells whether to stop; all processes of a run get the same answer.

  Attributes:
    received: The names of the signals that this process received.
  """

  def __init__(self):
    self.received: list[str] = []
    self._next = 0
    self._last: tuple[int, float] | None = None  # Step and time.

  def __call__(self, step: int | None = None) -> bool:
    """Whether any process received a signal.

    All processes must call this at the same moments. Asking the others takes
    time, so we do not ask at every step. All processes compute the next step to
    ask at from the pace of the slowest one.

    Args:
      step: The step, between two steps; None at any other moment, which always
        asks.
    """
    if jax.process_count() == 1:
      return bool(self.received)
    if step is not None and step < self._next:
      return False
    now, pace = time.monotonic(), ASK_EVERY
    if step is not None and self._last is not None:
      pace = (now - self._last[1]) / max(step - self._last[0], 1)
    mine = np.array([bool(self.received), pace], np.float32)
    stop, slowest = multihost_utils.process_allgather(mine).max(axis=0)
    if step is not None:
      steps = ASK_EVERY / max(float(slowest), 1e-3)
      self._next = step + max(1, min(int(steps), 100))
      self._last = step, now
    return bool(stop)


@contextlib.contextmanager
def signals() -> Iterator[Asked]:
  """Records SIGTERM and Ctrl-C, so that the loop can stop between two steps.

  After the first signal, Ctrl-C ends the process at once.
  """
  asked = Asked()
  if threading.current_thread() is not threading.main_thread():
    yield asked
    return

  def note(number, frame):
    del frame
    asked.received.append(signal.Signals(number).name)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # We cannot use logging, because the signal may have interrupted a call of
    # it. The escape code shows the cursor, which the progress bar hides.
    cursor = '\x1b[?25h' if os.isatty(2) else ''
    text = f'{cursor}{asked.received[-1]}: saving; Ctrl-C leaves at once\n'
    os.write(2, text.encode())

  before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield asked
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def explained(directory: epath.Path) -> Iterator[None]:
  """Turns an error about a full disk into one that says what to do."""
  try:
    yield
  except Exception as error:
    if not is_full(error):
      raise
    steps = checkpoints.finished_steps(directory / 'checkpoints')
    raise OSError(
      f'no space is left for {directory}. '
      + (
        f'Its checkpoint of step {steps[-1]} is complete'
        if steps
        else 'It holds no checkpoint yet'
      )
      + ': free space and start the same command again; it resumes from'
      f' {"there" if steps else "the beginning"}'
    ) from error
