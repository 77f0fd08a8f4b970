"""Checkpoints of the train state: what is trained, and nothing else.

Of several processes, 0 writes them, and all read: none ever waits for another
in the middle of a checkpoint, and what fails is tried again by one. Orbax
writes them in the background, each into a temporary directory that is
renamed when it is complete. The frozen base is never written; `fingerprint`
tells whether it is the same one.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from ptune import paths
from ptune.convert.identity import spread
from ptune.errors import UserError
from ptune.model import partitioning
from ptune.training.report import write_atomically
from ptune.training.state import TrainState

RUN_FILE = 'run.json'
# What facts are called in messages, where their name does not say it.
_FACTS = {
  'base': 'frozen weights, from INITIAL_CHECKPOINT_PATH (their fingerprint)',
  'initial_step': 'step of INITIAL_CHECKPOINT_PATH',
}

# Seconds before a failed save is tried again: what is to be freed on a disk, or
# to come back in a bucket, may take a moment.
PAUSES = (1.0, 5.0, 25.0)

# What an optimizer step leaves behind between two records of the log.
Sums = Mapping[str, float]


def run_directory(model_dir: os.PathLike[str] | str | None) -> epath.Path:
  """MODEL_DIR as an absolute path: Orbax takes no other.

  Raises:
    ValueError: If it is empty.
  """
  if not model_dir or not isinstance(model_dir, str | os.PathLike):
    raise UserError(
      f'MODEL_DIR is {model_dir!r}; it must be a directory, for example'
      ' --gin.MODEL_DIR="\'/runs/sst2\'"'
    )
  return absolute(model_dir)


def absolute(path: os.PathLike[str] | str) -> epath.Path:
  """A path that means the same in any working directory.

  Raises:
    UserError: If it is no path.
  """
  text = paths.local(path)
  return epath.Path(text if '://' in text else os.path.abspath(text))


def check_writable(name: str, directory: epath.Path) -> None:
  """Makes a directory, and finds out whether results can be written there.

  Raises:
    ValueError: If not; `name` is what users call it.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f'.writable-{os.getpid()}'
    # A full disk may still take a few bytes.
    probe.write_bytes(bytes(65536))
    probe.unlink()
  except OSError as error:
    raise UserError(
      f'{name} {directory} cannot be written: {error.strerror or error}. Choose'
      ' another, or free space'
    ) from error


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
    self._keep = keep
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


def save_best(directory: os.PathLike[str], state: TrainState) -> None:
  """Makes a state the one that a directory holds."""
  directory, state = epath.Path(directory), _here(state)
  manager = _manager(directory, keep=1)
  if manager is None:
    return
  with manager:
    # Newer ones are of an earlier start, which was stopped before its next
    # checkpoint: those steps are taken again, and are scored again.
    for step in manager.all_steps():
      if step > int(state.step):
        manager.delete(step)
    _save(manager, state, {})


def read_run(model_dir: os.PathLike[str]) -> dict[str, Any]:
  """What the run of a MODEL_DIR is, as `claim` wrote it, or {}."""
  path = epath.Path(model_dir) / RUN_FILE
  if not path.exists():
    return {}
  paths.check_file(path)
  try:
    return dict(json.loads(path.read_text()))
  except (ValueError, TypeError, RecursionError) as error:
    raise UserError(
      f'{path} is damaged ({error}), so it cannot be told what run'
      f' {path.parent} holds. Restore the file, or choose another MODEL_DIR'
    ) from error


def claim(
  model_dir: os.PathLike[str],
  run: Mapping[str, Any],
  notes: Mapping[str, Any],
) -> None:
  """Says what run a MODEL_DIR is for, where that is not said yet.

  Args:
    model_dir: The directory.
    run: Facts that do not change while a run goes on, as JSON has them.
    notes: Facts that are written beside them and may change.
  """
  path = epath.Path(model_dir) / RUN_FILE
  if jax.process_index() == 0 and not path.exists():
    write_atomically(path, json.dumps({**run, **notes}, indent=2) + '\n')


def compare(
  model_dir: os.PathLike[str] | str,
  present: Mapping[str, Any],
  run: Mapping[str, Any],
) -> None:
  """Checks that a run on disk, if there is one, is the given one.

  Args:
    model_dir: The directory, for the message.
    present: From `read_run`.
    run: Facts of the run at hand.

  Raises:
    ValueError: If they differ; all that differs is listed.
  """
  differing = [
    f'  {_FACTS.get(key, key)}: {present[key]!r} there, {value!r} here'
    for key, value in run.items()
    if key in present and present[key] != value
  ]
  if differing:
    raise UserError(
      f'MODEL_DIR {os.fspath(model_dir)} holds a run that is not this one:\n'
      + '\n'.join(differing)
      + '\nNothing was changed. Give the settings of that run, or choose'
      ' another MODEL_DIR'
    )


def fingerprint(params: Mapping[str, jax.Array]) -> str:
  """Identifies a model's weights.

  Equal for the same weights on any mesh, in float32 or bfloat16: it is made
  of integer sums over the values rounded to bfloat16.

  Args:
    params: The base parameters, by path.

  Returns:
    16 hexadecimal digits.
  """
  sums = jax.device_get(jax.jit(_checksums)(dict(params)))
  digest = hashlib.sha256()
  for path in sorted(params):
    shape = tuple(params[path].shape)
    digest.update(f'{path} {shape} {int(sums[path])}\n'.encode())
  return digest.hexdigest()[:16]


def _checksums(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
  def checksum(x):
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    bits = bits.astype(jnp.uint32)
    # Each value counts by its position, so that a permutation is noticed.
    # uint32 sums wrap around: the order of summation does not matter.
    position = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(x.shape):
      i = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
      position = position * np.uint32(size % 2**32) + i
    return jnp.sum(bits * spread(position))

  return {path: checksum(x) for path, x in params.items()}
