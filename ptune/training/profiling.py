"""Traces some training steps, to show what takes time (PROFILE_STEPS)."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging


class Profile:
  """Traces steps on process 0, from the first call of `step` on.

  Each start of a run writes plugins/profile/TIME/ below the directory, for
  TensorBoard, with a perfetto_trace.json.gz. As a context manager, it ends a
  trace when the run ends early.
  """

  def __init__(self, directory: os.PathLike[str], steps: int | None):
    """Stores the arguments.

    Args:
      directory: Where to write traces.
      steps: The number of steps to trace; None or 0 for none.
    """
    self._directory = os.fspath(directory)
    self._left = (steps or 0) if jax.process_index() == 0 else 0
    self._on = False

  def __enter__(self) -> 'Profile':
    return self

  def __exit__(self, *error: Any) -> None:
    if self._on:
      self._end()

  @contextlib.contextmanager
  def step(self, number: int, state: Any) -> Iterator[None]:
    """A context in which the caller starts step `number`.

    Args:
      number: The step.
      state: The state before this step. We wait for it where a trace begins or
        ends, so that the trace holds whole steps.
    """
    if not self._left:
      if self._on:
        jax.block_until_ready(state)
        self._end()
      yield
      return
    if not self._on:
      jax.block_until_ready(state)
      jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
      self._on = True
    self._left -= 1
    with jax.profiler.StepTraceAnnotation('train', step_num=number):
      yield

  def _end(self) -> None:
    self._on, self._left = False, 0
    jax.profiler.stop_trace()
    logging.info(
      'the trace is in %s: `pip install tensorboard xprof` and'
      ' `tensorboard --logdir=%s` show it, or open the newest'
      ' perfetto_trace.json.gz there at https://ui.perfetto.dev',
      self._directory,
      self._directory,
    )
