"""A trace of some steps of training, to see what takes time (PROFILE_STEPS)."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging


class Profile:
  """Traces steps on process 0, from the first that it is told of.

  Below the directory, each start of a run writes plugins/profile/TIME/, for
  TensorBoard, and in it perfetto_trace.json.gz. As a context manager it ends a
  trace that is cut short.
  """

  def __init__(self, directory: os.PathLike[str], steps: int | None):
    """Writes nothing yet.

    Args:
      directory: Where traces go.
      steps: How many are traced; None or 0 for none.
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
    """In this context step `number` is started.

    Args:
      number: The step.
      state: What the step before left; waited for where a trace begins or
        ends, so that it holds whole steps.
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
      'traced steps lie in %s: `pip install tensorboard xprof` and'
      ' `tensorboard --logdir=%s` show them, or open the newest'
      ' perfetto_trace.json.gz there at https://ui.perfetto.dev',
      self._directory,
      self._directory,
    )
