"""Every parameter of a run: its shape and place, and where its values are from.

`Plan` says what there will be before anything is built. The values of the base
model come from a checkpoint, strictly; those of the adapters are initialised.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ptune.errors import UserError
from ptune.host.columns import aligned
from ptune.model import network as network_lib
from ptune.model import partitioning, scan, structure
from ptune.model.adapters import Method, Rows
from ptune.model.sizes import Config

Flat = dict[str, Any]

EMBEDDING = 'token_embedder/embedding'


def flatten(tree: Mapping[str, Any]) -> Flat:
  """{'encoder': {'norm': x}} -> {'encoder/norm': x}."""
  return traverse_util.flatten_dict(tree, sep='/')


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """{'encoder/norm': x} -> {'encoder': {'norm': x}}."""
  return traverse_util.unflatten_dict(dict(flat), sep='/')


def merge(*trees: Mapping[str, Any]) -> dict[str, Any]:
  """Puts trainable and frozen parameters together, for the network."""
  merged: Flat = {}
  for tree in trees:
    merged.update(flatten(tree))
  return unflatten(merged)


@dataclasses.dataclass(frozen=True)
class Plan:
  """All parameters of a network under a method, laid out on a mesh.

  Attributes:
    network: The network with the method's adapters.
    method: The method.
    mesh: The devices.
    rules: The logical axis rules in force.
    axes: Logical axis names, by path.
    params: Shape, type and sharding, by path.
    base: The paths that a checkpoint of the base model must hold.
    trainable: The paths that are trained; the others are frozen.
    rows: Reads the base's embedding, once a base is known; for `Method.fold`.
  """

  network: network_lib.Transformer
  method: Method
  mesh: Mesh
  rules: partitioning.Rules
  axes: Mapping[str, tuple[str, ...]]
  params: Mapping[str, jax.ShapeDtypeStruct]
  base: frozenset[str]
  trainable: frozenset[str]
  rows: Rows | None = None

  def select(self, paths: Iterable[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters at the given paths, in the order of `params`."""
    wanted = frozenset(paths)
    return {path: x for path, x in self.params.items() if path in wanted}

  @property
  def frozen(self) -> frozenset[str]:
    """The paths that are not trained."""
    return frozenset(self.params) - self.trainable

  @property
  def adapters(self) -> frozenset[str]:
    """The paths that the method added."""
    return frozenset(self.params) - self.base

  def scope(self):
    """A context in which the network is traced for this mesh."""
    return partitioning.scope(self.mesh, self.rules)

  def on(self, mesh: Mesh) -> 'Plan':
    """The same parameters on another mesh."""
    config = self.network.config
    rules = partitioning.rules(mesh, config)
    shardings = partitioning.shardings(mesh, rules, self.axes)
    if config.fsdp:
      matrices = {
        path: self.axes[path]
        for path in self.base - self.trainable
        if len(self.params[path].shape) > 1
      }
      split = partitioning.rules(mesh, config, partitioning.FULLY_SHARDED)
      shardings |= partitioning.shardings(mesh, split, matrices)
    params = {
      path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[path])
      for path, x in self.params.items()
    }
    return dataclasses.replace(self, mesh=mesh, rules=rules, params=params)


def plan(config: Config, method: Method, mesh: Mesh) -> Plan:
  """Works out every parameter; builds nothing.

  Raises:
    ValueError: If a placement matches no site, or the method trains a
      parameter that is not there.
  """
  network = network_lib.Transformer(config, method.placements)
  params = structure.parameters(network)
  trainable = frozenset(filter(method.trains, params))
  idle = [p for p in method.trainable if not _any_match(p, trainable)]
  if idle:
    raise UserError(
      f'method {method.name!r} trains {idle}, which no parameter matches;'
      ' the parameters are:\n  ' + '\n  '.join(params)
    )
  if config.scan:
    scan.check_trainable(method.name, params, trainable)
  structs = {
    path: jax.ShapeDtypeStruct(
      x.shape,
      jnp.float32 if path in trainable else _frozen_dtype(config, path, x),
    )
    for path, x in params.items()
  }
  base = structure.parameters(network_lib.Transformer(config))
  return Plan(
    network=network,
    method=method,
    mesh=mesh,
    rules=(),
    axes=structure.parameter_axes(network),
    params=structs,
    base=frozenset(base),
    trainable=trainable,
  ).on(mesh)


def _any_match(pattern: str, paths: Iterable[str]) -> bool:
  return any(Method('', (), (pattern,)).trains(path) for path in paths)


def _frozen_dtype(config, path: str, x: jax.ShapeDtypeStruct) -> jnp.dtype:
  """What a matrix is read in; what is used in float32 is kept in that."""
  if x.ndim < 2 or path.endswith('rel_embedding'):
    return jnp.dtype(jnp.float32)
  if config.frozen_dtype in (None, 'int8'):  # int8 is made of it by `hold`.
    return jnp.dtype(config.dtype)
  return jnp.dtype(config.frozen_dtype)


# The matrices that may be int8, and the axis along which a scale is shared.
_SHARED_AXIS = {'kernel': 0, 'embedding': 1}


def freeze(plan: Plan, frozen: Flat) -> Flat:
  """Frozen parameters as a run keeps them.

  With frozen_dtype 'int8', a matrix becomes int8, and beside it stands
  `<name>_scale`, float32, by which each output channel (of a kernel) or row
  (of the embedding) is multiplied: the largest magnitude over 127. With scan,
  those of the layers are one array, see `scan`.

  Args:
    plan: The plan.
    frozen: The parameters, by path; emptied, so that memory is free for others.

  Returns:
    Arrays, by path; the given ones where there is nothing to do.
  """
  held = {}
  quantized = frozenset(_quantized(plan))
  for path in list(frozen):
    if path in quantized:
      value = frozen.pop(path)
      with plan.scope():
        held[path], held[f'{path}_scale'] = jax.jit(
          _to_int8, static_argnums=1, out_shardings=_int8_shardings(plan, path)
        )(value, _SHARED_AXIS[path.split('/')[-1]])
    else:
      held[path] = frozen.pop(path)
  if plan.network.config.scan:
    for name, paths in scan.groups(held).items():
      layers = [held.pop(path) for path in paths]
      sharding = _stacked_sharding(layers[0].sharding)
      held[name] = jax.jit(jnp.stack, out_shardings=sharding)(layers)
  return held


def frozen_shapes(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape, type and sharding of what `hold` returns, by path."""
  structs = _held_by_layer(plan)
  if plan.network.config.scan:
    for name, paths in scan.groups(structs).items():
      layers = [structs.pop(path) for path in paths]
      structs[name] = jax.ShapeDtypeStruct(
        (len(layers), *layers[0].shape),
        layers[0].dtype,
        sharding=_stacked_sharding(layers[0].sharding),
      )
  return structs


def _stacked_sharding(sharding: Any) -> NamedSharding:
  """That of [layers, ...]: every device holds its part of each layer."""
  return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def _held_by_layer(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
  """The same under T5X's names, whatever the network takes together."""
  structs = plan.select(plan.frozen)
  for path in _quantized(plan):
    values, scales = _int8_shardings(plan, path)
    shape = structs[path].shape
    kept = 1 - _SHARED_AXIS[path.split('/')[-1]]
    structs[path] = jax.ShapeDtypeStruct(shape, jnp.int8, sharding=values)
    structs[f'{path}_scale'] = jax.ShapeDtypeStruct(
      (shape[kept],), jnp.float32, sharding=scales
    )
  return structs


def _quantized(plan: Plan) -> list[str]:
  if plan.network.config.frozen_dtype != 'int8':
    return []
  return [
    path
    for path in plan.frozen & plan.base
    if path.split('/')[-1] in _SHARED_AXIS
  ]


def _int8_shardings(plan: Plan, path: str):
  """Of the values, and of their scales."""
  sharding = plan.params[path].sharding
  assert isinstance(sharding, NamedSharding)
  kept = sharding.spec[1 - _SHARED_AXIS[path.split('/')[-1]]]
  return sharding, NamedSharding(plan.mesh, PartitionSpec(kept))


def _to_int8(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
  # A channel of zeros stays one.
  values = jnp.round(x / jnp.where(scale > 0, scale, 1))
  return values.astype(jnp.int8), jnp.squeeze(scale, axis)


def rows_as_held(plan: Plan, rows: np.ndarray) -> np.ndarray:
  """Rows of the token embedding as the network looks them up.

  Args:
    plan: The plan.
    rows: [n, embed] as in the checkpoint.

  Returns:
    [n, embed] float32, rounded as `hold` and `layers.Embed` round them.
  """
  x = jnp.asarray(rows).astype(plan.params[EMBEDDING].dtype)
  if EMBEDDING in _quantized(plan):
    values, scale = _to_int8(x, _SHARED_AXIS['embedding'])
    x = values * scale[:, None]
  return np.asarray(x.astype(plan.network.config.dtype), np.float32)


def initialize(
  plan: Plan, paths: Iterable[str], seed: int
) -> dict[str, jax.Array]:
  """Draws parameters from the network's own initialisers.

  Only what is asked for is computed, each straight into its sharding.
  """
  wanted = plan.select(paths)
  if not wanted:
    return {}

  def init(key):
    tokens = jnp.ones((1, 2), jnp.int32)
    variables = structure.unrolled(plan.network).init(
      key, tokens, tokens, tokens, enable_dropout=False
    )
    flat = flatten(variables['params'])
    return {path: flat[path].astype(x.dtype) for path, x in wanted.items()}

  out = {path: x.sharding for path, x in wanted.items()}
  with plan.scope():
    return jax.jit(init, out_shardings=out)(jax.random.key(seed))


def place(value: np.ndarray, struct: jax.ShapeDtypeStruct) -> jax.Array:
  """Puts a host array, which every process has, into its sharding."""
  value = np.asarray(value, struct.dtype)
  assert value.shape == struct.shape, (value.shape, struct.shape)
  return jax.make_array_from_callback(
    struct.shape, struct.sharding, lambda index: value[index]
  )


def whole(x: jax.Array) -> np.ndarray:
  """Copies an array to this host; by all processes, where they share it."""
  if x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def embedding_rows(
  plan: Plan, params: Mapping[str, jax.Array], ids: np.ndarray
) -> np.ndarray:
  """Embeds tokens as the encoder does, on every host: [n] -> [n, embed].

  Args:
    plan: The plan.
    params: The parameters, by path, before `hold`.
    ids: [n] rows of the embedding.

  Returns:
    [n, embed] float32, as the site `encoder/embed` has them.

  Raises:
    ValueError: If the embedding does not have all of these rows.
  """
  table = params[EMBEDDING]
  # On a device, an index beyond the last row would silently give the last.
  if len(ids) and not 0 <= np.min(ids) <= np.max(ids) < table.shape[0]:
    raise UserError(
      f'got token ids from {np.min(ids)} to {np.max(ids)}, but the embedding'
      f' has {table.shape[0]} rows; use the vocabulary of the model'
    )
  replicated = partitioning.replicated(table.sharding.mesh)
  scale = plan.network.config.embedding_scale
  take = jax.jit(
    lambda table, ids: table[ids].astype(jnp.float32) * scale,
    out_shardings=replicated,
  )
  return np.array(take(table, np.asarray(ids, np.int32)))


def sites(
  plan: Plan, params: Mapping[str, jax.Array], ids: Sequence[int]
) -> dict[str, np.ndarray]:
  """What leaves each site of the base that reads a text, on every host.

  Args:
    plan: The plan.
    params: The base's parameters, by path.
    ids: [n] the text.

  Returns:
    Arrays [1, n, ...] float32, by the path of the site.
  """
  read = jax.jit(
    functools.partial(structure.read_sites, plan.network.config),
    out_shardings=partitioning.replicated(plan.mesh),
  )
  base = {path: params[path] for path in plan.base}
  with plan.scope():
    return jax.device_get(read(base, np.asarray(ids, np.int32)[None]))


def identity(plan: Plan) -> dict[str, Any]:
  """What a run is known by: its method and what that trains, as JSON."""
  trained = plan.select(plan.trainable)
  # Full tuning trains hundreds of arrays; their number and size identify it.
  shapes = {path: list(x.shape) for path, x in trained.items()}
  if len(shapes) > 8:
    count = sum(math.prod(x.shape) for x in trained.values())
    shapes = {'arrays': len(shapes), 'parameters': count}
  found = {'method': plan.method.name, 'trainable': shapes}
  # Runs of methods without any have no such entry.
  settings = dict(plan.method.settings)
  return found | ({'settings': settings} if settings else {})


def describe(plan: Plan) -> str:
  """A table of all parameters, for `model-info.txt`."""
  rows = [('name', 'shape', 'dtype', 'axes', '', 'bytes')]
  for path, x in (plan.select(plan.trainable) | _held_by_layer(plan)).items():
    rows.append(
      (
        path,
        str(list(x.shape)),
        x.dtype.name,
        ', '.join(plan.axes.get(path, ())),
        'trainable' if path in plan.trainable else 'frozen',
        f'{nbytes(x):,}',
      )
    )
  return '\n'.join([summary(plan), '', *aligned(rows, right={5}), ''])


def summary(plan: Plan) -> str:
  """One line: how many parameters are trained and frozen, and their bytes."""
  parts = []
  for name, paths in (
    ('trainable', plan.trainable),
    ('frozen', plan.frozen),
  ):
    count = sum(math.prod(x.shape) for x in plan.select(paths).values())
    kept = frozen_shapes(plan) if paths == plan.frozen else plan.select(paths)
    size = sum(map(nbytes, kept.values()))
    parts.append(f'{name} {count:,} parameters ({format_bytes(size)})')
  mesh = ' x '.join(f'{n} {axis}' for axis, n in plan.mesh.shape.items())
  return f'{plan.method.name}: {", ".join(parts)}, on a mesh of {mesh}'


def nbytes(x: jax.ShapeDtypeStruct) -> int:
  """Bytes of one copy of an array."""
  return math.prod(x.shape) * x.dtype.itemsize


def format_bytes(n: float) -> str:
  """204800 -> '204.8 kB'."""
  for unit in ('bytes', 'kB', 'MB', 'GB'):
    if n < 1000 or unit == 'GB':
      return f'{n:,.0f} {unit}' if unit == 'bytes' else f'{n:,.1f} {unit}'
    n /= 1000
  raise AssertionError
