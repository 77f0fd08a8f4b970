"""Checkpoints of the train state, which holds trained parameters only.

Process 0 writes checkpoints and every process reads them. So no process waits
for another in the middle of a checkpoint, and one process can retry what
failed. Orbax writes in the background, into a temporary directory that it
renames when the checkpoint is complete. The frozen base is never written.
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

# Seconds before a failed save is tried again, because freeing disk space or
# reaching a bucket again may take a moment.
PAUSES = (1.0, 5.0, 25.0)

# The sums over the steps since the last record of the log, by member of a run.
Sums = Mapping[str, Mapping[str, float]]


def restore(
  directory: os.PathLike[str], abstract: TrainState
) -> tuple[TrainState, Sums] | None:
  """Reads the newest readable checkpoint; changes nothing on disk.

  Each process reads what its devices need. If one process cannot read a
  checkpoint, all processes skip it.

  Args:
    directory: Usually MODEL_DIR/checkpoints; it need not exist.
    abstract: The shapes, types and shardings of the state.

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
  target = flax.serialization.to_state_dict(abstract)
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
      except Exception as error:  # A damaged file can raise anything.
        if 'tree structures do not match' in str(error):
          raise UserError(
            f'checkpoint {directory / str(step)} holds the state of another'
            ' optimizer: set OPTIMIZER and its settings as before, or choose'
            ' another MODEL_DIR. Nothing was changed'
          ) from error
        problem = _first_line(error)
      if all(_gathered(found is not None)):
        assert found is not None
        state = flax.serialization.from_state_dict(abstract, found['state'])
        return state, found['sums']
      logging.error(
        'checkpoint %s cannot be read and is skipped: %s',
        directory / str(step),
        problem,
      )
  raise UserError(
    f'none of the checkpoints {steps} in {directory} can be read (see above).'
    ' Nothing was changed. Restore their files, or, to train from the'
    ' beginning, choose another MODEL_DIR'
  )


def _gathered(value: int) -> list[int]:
  """The value of each process."""
  if jax.process_count() == 1:
    return [value]
  return multihost_utils.process_allgather(np.int32(value)).tolist()


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or ['']
  return f'{type(error).__name__}: {lines[0][:300]}'


def finished_steps(directory: os.PathLike[str]) -> list[int]:
  """The steps with a complete checkpoint on disk, in order."""
  directory = epath.Path(directory)
  if not directory.is_dir():
    return []
  # Orbax's manager would wait for the other processes.
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
  """Options for one process alone, so Orbax never waits for a failed one."""
  this = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=this,
    active_processes={this},
    barrier_sync_key_prefix=f'process {this}',
  )


class Checkpoints:
  """Writes the checkpoints of a run to `<directory>/<step>/state`.

  Beside the state, `sums` holds what has not been logged yet.
  """

  def __init__(
    self, directory: os.PathLike[str], start: int, keep: int | None = None
  ):
    """Opens the directory, making it if needed.

    Args:
      directory: Usually MODEL_DIR/checkpoints.
      start: The restored step. Newer checkpoints could not be read, so they are
        renamed to `<step>.damaged`, and their steps are repeated.
      keep: The number of newest checkpoints to keep; None for all.
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
    """Whether writing the last checkpoint failed, so that it must be repeated.

    Only a single process knows this at once. With several processes, the next
    `save` finds out.
    """
    if jax.process_count() > 1:
      return False
    assert self._manager is not None
    try:
      self._manager.check_for_errors()
    except Exception:  # `save` finds it, too.
      return True
    return False

  def save(self, state: TrainState, sums: Sums, wait: bool = False) -> None:
    """Starts writing a state; the caller may donate it afterwards.

    If this save or the previous one fails, we wait a little and write the state
    again. All processes must call this; they agree on whether it failed.

    Args:
      state: The state.
      sums: What has not been logged yet.
      wait: Whether to return only when the state is on disk.

    Raises:
      OSError: If every attempt fails; names the last good checkpoint.
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
        with contextlib.suppress(Exception):  # Deletes incomplete files.
          self._manager = _manager(self.directory, self._keep)

  def _try(self, state: TrainState, sums: Sums, wait: bool) -> Exception | None:
    """Saves once, in process 0; returns the error, if any."""
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
    """A sentence that names the last good checkpoint."""
    steps = finished_steps(self.directory)
    if not steps:
      return 'Nothing was saved yet; the same command starts from the beginning'
    return (
      f'The checkpoint of step {steps[-1]} is good and was kept; the same'
      ' command resumes from there'
    )

  def restarts(self) -> set[int]:
    """The steps from which the run may resume if it is killed now.

    These are the newest step on disk and the one that is being written.
    """
    return {self._begun, max(finished_steps(self.directory), default=0)}

  def wait(self) -> None:
    """Waits until everything is on disk; raises the error if that failed."""
    if self._manager is not None:
      self._manager.wait_until_finished()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind, error, traceback) -> None:
    # If an error is being raised already, another one would add nothing.
    with contextlib.suppress(*([Exception] if kind else [])):
      if self._manager is not None:
        self._manager.close()


def _manager(
  directory: epath.Path, keep: int | None
) -> ocp.CheckpointManager | None:
  """Orbax's manager in process 0; None in the others."""
  if jax.process_index() > 0:
    return None
  directory.mkdir(parents=True, exist_ok=True)
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep,
    create=False,
    cleanup_tmp_directories=True,
    # Otherwise, if this fails, Orbax's threads wait minutes for the directory.
    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    multiprocessing_options=_alone(),
  )
  return ocp.CheckpointManager(directory, options=options)


def _here(state: TrainState) -> TrainState:
  """The whole state in the memory of process 0.

  An array that is split over several processes is gathered; we gather one array
  after the other. A single process returns the state as it is.
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
  """Saves a state as the newest of a directory.

  Args:
    directory: MODEL_DIR/best.
    state: The state.
    restarts: The steps from which the run may resume; see `prune_best`.
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
  """Deletes states that were the best once and are no longer needed.

  We keep the newest state. For each step from which the run may resume, we also
  keep the newest state up to that step, because a restart there deletes the
  later ones.
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
  """Deletes the states after a step; returns whether there were any."""
  directory = epath.Path(directory)
  steps = finished_steps(directory)
  newer = [found for found in steps if found > step]
  for found in newer:
    (directory / str(found)).rmtree()
  if newer == steps != []:
    directory.rmtree()
  return bool(newer)
