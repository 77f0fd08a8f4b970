"""The mesh, and the rules that shard logical axes over its axes.

The mesh has two axes: `data` shards the batch, `model` the weights. The same
program runs on one device and on many; only the mesh differs.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from absl import logging
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ptune.errors import UserError
from ptune.model.sizes import Config

# Logical axis -> mesh axis. The axes of adapters are replicated, so every
# process has the whole prompt and process 0 can write it.
LOGICAL_AXIS_RULES = (
  ('batch', 'data'),
  ('vocab', 'model'),
  ('mlp', 'model'),
  ('heads', 'model'),
  ('kv_heads', 'model'),
  ('joined_kv', 'model'),
  ('embed', None),
  ('kv', None),
  ('length', None),
  ('relpos_buckets', None),
  ('prompt', None),
  ('prompt_embed', None),
  ('task', None),
  ('adapter_in', None),
  ('adapter_hidden', None),
  ('adapter_out', None),
  ('adapter_heads', None),
  ('adapter_kv', None),
)
# With ModelConfig.fsdp, frozen matrices are sharded over `data` too. Each has
# an axis `embed`.
FULLY_SHARDED = {'embed': 'data'}

Rules = Sequence[tuple[str, str | None]]


def make_mesh(
  model_parallel: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Arranges the devices as [data, model].

  Args:
    model_parallel: Number of devices that share one copy of the weights.
    devices: The devices; all of them if not given.

  Raises:
    UserError: If model_parallel does not divide the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  n = len(devices)
  if model_parallel < 1 or n % model_parallel:
    fitting = [m for m in range(1, n + 1) if n % m == 0]
    raise UserError(
      f'MODEL_PARALLEL is {model_parallel}, which does not divide the'
      f' {n} devices; choose one of {fitting}'
    )
  grid = np.asarray(devices).reshape(n // model_parallel, model_parallel)
  # Linen's modules do not work with explicit axes, jax.make_mesh's default.
  return Mesh(grid, ('data', 'model'), axis_types=(AxisType.Auto,) * 2)


def rules(
  mesh: Mesh, config: Config, changes: Mapping[str, str | None] | None = None
) -> Rules:
  """The logical axis rules for a mesh.

  An axis whose size the devices do not divide is replicated: six heads cannot
  be sharded over four devices, but other axes of that model can.

  Args:
    mesh: The devices.
    config: The sizes.
    changes: Rules that replace some of `LOGICAL_AXIS_RULES`, such as
      `FULLY_SHARDED`.
  """
  sizes = config.axis_sizes()
  kept = []
  for axis, over in (dict(LOGICAL_AXIS_RULES) | dict(changes or {})).items():
    if over == 'model' and axis not in sizes:
      continue  # An axis of another family.
    if over and any(n % mesh.shape[over] for n in sizes.get(axis, ())):
      logging.info(
        '%s (%s) is not sharded over the %d devices of axis %r',
        axis,
        ', '.join(map(str, sizes[axis])),
        mesh.shape[over],
        over,
      )
      over = None
    kept.append((axis, over))
  return tuple(kept)


@contextlib.contextmanager
def scope(mesh: Mesh, logical_rules: Rules) -> Iterator[None]:
  """Programs traced in this context use the mesh and its rules."""
  # Under `with mesh:`, the network's sharding constraints have no effect.
  with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules):
    yield


def shardings(
  mesh: Mesh,
  logical_rules: Rules,
  axes: Mapping[str, tuple[str, ...]],
) -> dict[str, NamedSharding]:
  """The sharding of each parameter, by path, from its logical axes."""
  table = dict(logical_rules)
  unknown = sorted({a for names in axes.values() for a in names} - set(table))
  if unknown:
    raise UserError(
      f'no logical axis rule for {unknown}; there are rules for {sorted(table)}'
    )
  return {
    path: NamedSharding(mesh, PartitionSpec(*(table[a] for a in names)))
    for path, names in axes.items()
  }


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device has in full."""
  return NamedSharding(mesh, PartitionSpec())
