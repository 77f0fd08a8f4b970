"""Checkpoints of the train state: what is trained, and nothing else.

Of several processes, 0 writes them, and all read: none ever waits for another
in the middle of a checkpoint, and what fails is tried again by one. Orbax
writes them in the background, each into a temporary directory that is
renamed when it is complete. The frozen base is never written.
"""

import contextlib
import os
import time
from collections.abc import Collection, Mapping

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from ptune.errors import UserError
from ptune.model import partitioning
from ptune.training.state import TrainState

# Seconds before a failed save is tried again: what is to be freed on a disk, or
# to come back in a bucket, may take a moment.
PAUSES = (1.0, 5.0, 25.0)

# By member of a run: what steps add up to between two records of the log.
Sums = Mapping[str, Mapping[str, float]]


def restore(
  directory: os.PathLike[str], like: TrainState
) -> tuple[TrainState, Sums] | None:
  """Reads the newest checkpoint that can be read; changes nothing on disk.

  Of several processes, each reads what its devices hold, and they agree: a
  checkpoint that one of them cannot read is passed over by all.

  Args:
    directory: Usually MODEL_DIR/checkpoints; need not exist.
    like: Shapes, types and shardings of the state.

  Returns:
    The state, and the sums that were saved with it; None if there is no
    checkpoint.

  Raises:
    ValueError: If there are checkpoints and none can be read.
  """
  directory = epath.Path(directory)
  steps = finished_steps(directory)[::-1]
  if len(set(_gathered(steps[0] if steps else -1))) > 1:
    raise UserError(
      f'the processes see different checkpoints in {directory}: MODEL_DIR must'
      ' be in a bucket, or on a file system that all hosts share'
    )
  if not steps:
    return None
  target = flax.serialization.to_state_dict(like)
  with _reader(directory) as reader:
    for step in steps:
      found, problem = None, 'another process cannot read it'
      try:
        found = reader.restore(
          step,
          args=ocp.args.Composite(
            state=ocp.args.StandardRestore(target), sums=ocp.args.JsonRestore()
          ),
        )
      except Exception as error:  # Whatever a damaged file may raise.
        if 'tree structures do not match' in str(error):
          raise UserError(
            f'checkpoint {directory / str(step)} holds the state of another'
            ' optimizer: set OPTIMIZER and its settings as they were, or choose'
            ' another MODEL_DIR. Nothing was changed'
          ) from error
        problem = _first_line(error)
      if all(_gathered(found is not None)):
        assert found is not None
        state = flax.serialization.from_state_dict(like, found['state'])
        return state, found['sums']
      logging.error(
        'checkpoint %s cannot be read and is passed over: %s',
        directory / str(step),
        problem,
      )
  raise UserError(
    f'none of the checkpoints {steps} in {directory} can be read (see above).'
    ' Nothing was changed. Restore their files, or, to train from the'
    ' beginning, choose another MODEL_DIR'
  )


def _gathered(value: int) -> list[int]:
  """What each process has for a value."""
  if jax.process_count() == 1:
    return [value]
  return multihost_utils.process_allgather(np.int32(value)).tolist()


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or ['']
  return f'{type(error).__name__}: {lines[0][:300]}'


def finished_steps(directory: os.PathLike[str]) -> list[int]:
  """The steps that are on disk and whole, in order."""
  directory = epath.Path(directory)
  if not directory.is_dir():
    return []
  # Not by Orbax's manager: that waits for the other processes.
  return sorted(
    int(path.name)
    for path in directory.iterdir()
    if path.name.isdecimal() and ocp.utils.is_checkpoint_finalized(path)
  )


def _reader(directory: epath.Path) -> ocp.CheckpointManager:
  options = ocp.CheckpointManagerOptions(
    read_only=True,
    create=False,
    save_interval_steps=0,
    multiprocessing_options=_alone(),
  )
  return ocp.CheckpointManager(directory, options=options)


def _alone() -> ocp.options.MultiprocessingOptions:
  """Each process by itself: Orbax would wait for one that has failed."""
  this = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=this,
    active_processes={this},
    barrier_sync_key_prefix=f'process {this}',
  )


class Checkpoints:
  """The checkpoints of a run, in `<directory>/<step>/state`, as they grow.

  Each has beside it, in `sums`, what the log has not told yet.
  """

  def __init__(
    self, directory: os.PathLike[str], start: int, keep: int | None = None
  ):
    """Opens the directory, making it if needed.

    Args:
      directory: Usually MODEL_DIR/checkpoints.
      start: The step that was restored. What is newer could not be read: its
        steps are taken again, and it is kept as `<step>.damaged`.
      keep: How many of the newest to keep; all if not given.
    """
    self.directory = epath.Path(directory)
    if jax.process_index() == 0:
      for step in finished_steps(self.directory):
        if step > start:
          _set_aside(self.directory / str(step))
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f'opened {self.directory}')
    self._keep, self._begun = keep, start
    self._manager = _manager(self.directory, keep)

  @property
  def failed(self) -> bool:
    """Whether what was being written is lost, and a state is to be saved.

    Known in one process alone; several find out when they save the next time.
    """
    if jax.process_count() > 1:
      return False
    assert self._manager is not None
    try:
      self._manager.check_for_errors()
    except Exception:  # Which `save` finds, too.
      return True
    return False

  def save(self, state: TrainState, sums: Sums, wait: bool = False) -> None:
    """Starts writing a state; the caller may donate it afterwards.

    If that fails, or what was written before has failed, the disk or bucket is
    given some time, and the state is written again. To be called by all
    processes, which agree on whether it failed.

    Args:
      state: The state.
      sums: What the log has not told yet.
      wait: Return when it is on disk.

    Raises:
      OSError: If it failed each time; says what is kept.
    """
    step, state = int(state.step), _here(state)
    self._begun = step
    for pause in (*PAUSES, None):
      error = self._try(state, sums, wait)
      if not any(_gathered(error is not None)):
        return
      problem = f'step {step} could not be saved in {self.directory}'
      if error is not None:
        problem += f' ({_first_line(error)})'
      if pause is None:
        raise OSError(f'{problem}. {self.last_good()}') from error
      logging.error('%s; trying again in %g s', problem, pause)
      time.sleep(pause)
      wait = True
      if self._manager is not None:
        with contextlib.suppress(Exception):
          self._manager.close()
        with contextlib.suppress(Exception):  # Cleans up what was begun.
          self._manager = _manager(self.directory, self._keep)

  def _try(self, state: TrainState, sums: Sums, wait: bool) -> Exception | None:
    """Saves once, in the process that writes; returns what went wrong."""
    if self._manager is None:
      return None
    try:
      self._manager.wait_until_finished()
      _save(self._manager, state, sums)
      if wait:
        self._manager.wait_until_finished()
    except Exception as error:
      # Orbax, TensorStore and TensorFlow each have an exception of their own.
      return error
    return None

  def last_good(self) -> str:
    """What is on disk whatever happens, as a sentence."""
    steps = finished_steps(self.directory)
    if not steps:
      return 'Nothing was saved yet; the same command begins again'
    return (
      f'The checkpoint of step {steps[-1]} is good and was kept; the same'
      ' command goes on from there'
    )

  def restarts(self) -> set[int]:
    """The steps from which a run may go on that is killed now.

    The newest that is on disk, and the one that is being written.
    """
    return {self._begun, max(finished_steps(self.directory), default=0)}

  def wait(self) -> None:
    """Returns when everything is on disk; raises what went wrong."""
    if self._manager is not None:
      self._manager.wait_until_finished()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind, error, traceback) -> None:
    # After an error that is on its way, another tells nothing new.
    with contextlib.suppress(*([Exception] if kind else [])):
      if self._manager is not None:
        self._manager.close()


def _manager(
  directory: epath.Path, keep: int | None
) -> ocp.CheckpointManager | None:
  """What writes, in process 0; None in the others."""
  if jax.process_index() > 0:
    return None
  directory.mkdir(parents=True, exist_ok=True)
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep,
    create=False,
    cleanup_tmp_directories=True,
    # Else, where that fails, Orbax's threads wait minutes for the directory.
    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    multiprocessing_options=_alone(),
  )
  return ocp.CheckpointManager(directory, options=options)


def _here(state: TrainState) -> TrainState:
  """A state as the process that writes needs it: whole, and its own.

  What is split over the devices of several processes is put together, one array
  after the other, in the memory of process 0.
  """
  if jax.process_count() == 1:
    return state

  def whole(x):
    replicated = partitioning.replicated(x.sharding.mesh)
    if not x.is_fully_replicated:
      x = jax.jit(lambda x: x, out_shardings=replicated)(x)
    return np.array(x.addressable_data(0)) if jax.process_index() == 0 else None

  return jax.tree.map(whole, state)


def _save(
  manager: ocp.CheckpointManager, state: TrainState, sums: Sums
) -> None:
  step = int(state.step)
  if step in manager.all_steps():
    return
  manager.save(
    step,
    args=ocp.args.Composite(
      state=ocp.args.StandardSave(flax.serialization.to_state_dict(state)),
      sums=ocp.args.JsonSave(dict(sums)),
    ),
    force=True,
  )


def _set_aside(checkpoint: epath.Path) -> None:
  target, n = checkpoint.parent / f'{checkpoint.name}.damaged', 1
  while target.exists():
    n += 1
    target = checkpoint.parent / f'{checkpoint.name}.damaged{n}'
  checkpoint.rename(target)
  logging.warning('%s was set aside as %s', checkpoint, target.name)


def save_best(
  directory: os.PathLike[str],
  state: TrainState,
  restarts: Collection[int] = (),
) -> None:
  """Makes a state the newest that a directory holds.

  Args:
    directory: MODEL_DIR/best.
    state: The state.
    restarts: The steps from which the run may go on, see `prune_best`.
  """
  directory, state = epath.Path(directory), _here(state)
  if jax.process_index() != 0:
    return
  drop_after(directory, int(state.step))
  manager = _manager(directory, keep=None)
  assert manager is not None
  with manager:
    _save(manager, state, {})
  prune_best(directory, restarts)


def prune_best(directory: os.PathLike[str], restarts: Collection[int]) -> None:
  """Removes the states that were the best once, and are of no more use.

  Kept are the newest one, and, for each step from which a run may go on, the
  newest up to there: those after it are dropped then.
  """
  steps = finished_steps(directory)
  if jax.process_index() != 0 or not steps:
    return
  kept = {steps[-1]}
  for restart in restarts:
    kept.update([step for step in steps if step <= restart][-1:])
  for step in set(steps) - kept:
    (epath.Path(directory) / str(step)).rmtree()


def drop_after(directory: os.PathLike[str], step: int) -> bool:
  """Removes the states after a step; returns whether there were any."""
  directory = epath.Path(directory)
  steps = finished_steps(directory)
  newer = [found for found in steps if found > step]
  for found in newer:
    (directory / str(found)).rmtree()
  if newer == steps != []:
    directory.rmtree()
  return bool(newer)
