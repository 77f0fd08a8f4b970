"""Puts batches on the devices, in a thread that works ahead."""

import collections
import concurrent.futures
import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from ptune.data.seqio_task import Batch
from ptune.errors import UserError

Check = Callable[[np.ndarray], None]


def check_batch_size(
  size: int, mesh: jax.sharding.Mesh, microbatches: int = 1
) -> None:
  """Raises a UserError if the axis `data` cannot split a microbatch evenly."""
  if 'data' not in mesh.shape:
    raise UserError(
      f'The mesh has the axes {mesh.axis_names}, expected one named data.'
    )
  devices = mesh.shape['data']
  parts = devices * microbatches
  if size % parts:
    below = size - size % parts
    fitting = ' or '.join(str(s) for s in (below, below + parts) if s)
    times = f', times {microbatches} MICROBATCHES' if microbatches > 1 else ''
    raise UserError(
      f'BATCH_SIZE is {size}, expected a multiple of the {devices} devices '
      f'along the mesh axis data{times}. Use {fitting}.'
    )


def device_put(
  batch: Batch, mesh: jax.sharding.Mesh, check: Check | None = None
) -> dict[str, jax.Array]:
  """Puts a global batch on the devices; splits its rows over the axis `data`.

  Every process passes the same batch and copies only the rows of its devices.

  Args:
    batch: Features [batch, length].
    mesh: The devices.
    check: The method's check of the encoder's input tokens.

  Raises:
    ValueError: If the mesh has no axis `data` or cannot split the batch evenly,
      or if `check` refuses the tokens.
  """
  if check is not None:
    check(batch['encoder_input_tokens'])
  check_batch_size(len(next(iter(batch.values()))), mesh)
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  return {
    name: jax.make_array_from_callback(array.shape, rows, array.__getitem__)
    for name, array in batch.items()
  }


def prefetch(
  batches: Callable[[int], Batch],
  start: int,
  stop: int,
  mesh: jax.sharding.Mesh,
  depth: int = 2,
  check: Check | None = None,
) -> Iterator[tuple[int, dict[str, jax.Array]]]:
  """Yields (step, batch on the devices) for steps start..stop-1.

  A thread works up to `depth` batches ahead. An error in it is raised at the
  step that it belongs to. Closing the generator ends the thread.
  """

  def make(step):
    return device_put(batches(step), mesh, check)

  steps = iter(range(start, stop))
  thread = concurrent.futures.ThreadPoolExecutor(1, 'ptune-data')
  try:
    ahead = collections.deque(
      thread.submit(make, step) for step in itertools.islice(steps, depth)
    )
    for step in range(start, stop):
      batch = ahead.popleft().result()
      ahead.extend(thread.submit(make, s) for s in itertools.islice(steps, 1))
      yield step, batch
  finally:
    thread.shutdown(cancel_futures=True)


def with_first(
  batches: Iterator[tuple[int, dict[str, jax.Array]]],
) -> Iterator[tuple[int, dict[str, jax.Array]]]:
  """Returns the same batches, but reads the first one now.

  This can take long if a stream has to skip to a late step.
  """
  first = list(itertools.islice(batches, 1))
  return itertools.chain(first, batches)
