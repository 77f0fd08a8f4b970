"""Checkpoints of the train state: what is trained, and nothing else.

Orbax writes them in the background, each into a temporary directory that is
renamed when it is complete. The frozen base is never written; `fingerprint`
tells whether it is the same one.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from ptune.state import TrainState

RUN_FILE = 'run.json'


class Checkpoints:
  """The checkpoints of a run, in `<directory>/<step>/state`."""

  def __init__(self, directory: os.PathLike[str], keep: int | None = None):
    """Opens the directory, making it if needed.

    Args:
      directory: Usually MODEL_DIR/checkpoints.
      keep: How many of the newest to keep; all if not given.
    """
    self.directory = epath.Path(directory)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, cleanup_tmp_directories=True
    )
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def save(self, state: TrainState) -> None:
    """Starts writing a state; the caller may donate it afterwards."""
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(flax.serialization.to_state_dict(state))
      ),
    )

  def restore(self, like: TrainState) -> TrainState | None:
    """Reads the newest checkpoint that can be read.

    Args:
      like: Shapes, types and shardings of the state.

    Returns:
      The state, or None if there is no checkpoint.

    Raises:
      ValueError: If there are checkpoints and none can be read.
    """
    target = flax.serialization.to_state_dict(like)
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        restored = self._manager.restore(
          step,
          args=ocp.args.Composite(state=ocp.args.StandardRestore(target)),
        )
      except Exception as error:  # Whatever a damaged file may raise.
        logging.error(
          'checkpoint %s cannot be read and is passed over: %s',
          self.directory / str(step),
          error,
        )
        continue
      if step != steps[0]:
        # Steps after this one are taken again, and saved again.
        for damaged in (s for s in steps if s > step):
          self._manager.delete(damaged)
      return flax.serialization.from_state_dict(like, restored['state'])
    if steps:
      raise ValueError(
        f'none of the checkpoints {steps} in {self.directory} can be read'
        ' (see the errors above); to train from the beginning, choose'
        ' another MODEL_DIR'
      )
    return None

  @property
  def newest(self) -> int | None:
    """The step of the newest checkpoint."""
    return self._manager.latest_step()

  def wait(self) -> None:
    """Returns when everything is on disk; raises what went wrong."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and ends the background threads."""
    self._manager.close()


def read_run(model_dir: os.PathLike[str]) -> dict[str, Any]:
  """What the run of a MODEL_DIR is, as `claim` wrote it, or {}."""
  path = epath.Path(model_dir) / RUN_FILE
  return json.loads(path.read_text()) if path.exists() else {}


def claim(
  model_dir: os.PathLike[str],
  run: Mapping[str, Any],
  notes: Mapping[str, Any],
) -> None:
  """Says what run a MODEL_DIR is for, or checks that it is for this one.

  Args:
    model_dir: The directory.
    run: Facts that do not change while a run goes on, as JSON has them.
    notes: Facts that are written beside them and may change.

  Raises:
    ValueError: If it holds another run; all that differs is listed.
  """
  present = read_run(model_dir)
  if present:
    compare(os.fspath(model_dir), present, run)
  elif jax.process_index() == 0:
    path = epath.Path(model_dir) / RUN_FILE
    temporary = path.parent / f'.{path.name}.tmp'
    temporary.write_text(json.dumps({**run, **notes}, indent=2) + '\n')
    temporary.replace(path)


def compare(
  where: str, present: Mapping[str, Any], run: Mapping[str, Any]
) -> None:
  """Raises ValueError if a run on disk is not the given one."""
  differing = [
    f'  {key}: {present.get(key)!r} there, {value!r} here'
    for key, value in run.items()
    if present.get(key) != value
  ]
  if differing:
    raise ValueError(
      f'{where} holds a run that is not this one:\n'
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
    weights = jnp.ones((), jnp.uint32)
    for axis in range(x.ndim):
      i = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
      weights = weights * np.uint32(31) + (i + 1) * np.uint32(2654435761)
    return jnp.sum(bits * weights)

  return {path: checksum(x) for path, x in params.items()}
