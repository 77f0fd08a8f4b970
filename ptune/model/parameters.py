"""The plan of all parameters of a run: shapes, shardings, trained or frozen.

A `Plan` is made by tracing, before any array exists. A checkpoint gives the
values of the base model; `initialize` draws those of the adapters.
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
from jax.sharding import Mesh

from ptune.errors import UserError
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
  """Merges trainable and frozen parameters into the tree of the network."""
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
    rows: Reads rows of the base's embedding, for `Method.fold`; None until the
      base is known.
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
  """Makes the plan of a method on a mesh.

  Raises:
    UserError: If a placement matches no site, or a pattern of the method's
      trainable parameters matches none.
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
  return Plan(
    network=network,
    method=method,
    mesh=mesh,
    rules=(),
    axes=structure.parameter_axes(network),
    params=structs,
    base=structure.base_paths(network),
    trainable=trainable,
  ).on(mesh)


def _any_match(pattern: str, paths: Iterable[str]) -> bool:
  return any(Method('', (), (pattern,)).trains(path) for path in paths)


def _frozen_dtype(config, path: str, x: jax.ShapeDtypeStruct) -> jnp.dtype:
  """The type of a frozen parameter; vectors and biases stay float32."""
  if x.ndim < 2 or path.endswith('rel_embedding'):
    return jnp.dtype(jnp.float32)
  if config.frozen_dtype in (None, 'int8'):  # `freeze` makes int8 of it.
    return jnp.dtype(config.dtype)
  return jnp.dtype(config.frozen_dtype)


def initialize(
  plan: Plan, paths: Iterable[str], seed: int
) -> dict[str, jax.Array]:
  """Draws parameters from the network's own initialisers.

  Computes only the given paths, each on the devices of its sharding.
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
  """Puts an array that every process has on the devices of a sharding."""
  value = np.asarray(value, struct.dtype)
  assert value.shape == struct.shape, (value.shape, struct.shape)
  return jax.make_array_from_callback(
    struct.shape, struct.sharding, lambda index: value[index]
  )


def to_host(x: jax.Array) -> np.ndarray:
  """Copies an array to the host.

  Processes that share the array must call it together.
  """
  if x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def embedding_rows(
  plan: Plan, params: Mapping[str, jax.Array], ids: np.ndarray
) -> np.ndarray:
  """Embeds tokens as the encoder does: [n] -> [n, embed], on every host.

  Args:
    plan: The plan.
    params: The parameters, by path, before `freeze`.
    ids: [n] rows of the embedding.

  Returns:
    [n, embed] float32, the values at the site `encoder/embed`.

  Raises:
    UserError: If the embedding does not have all of these rows.
  """
  table = params[EMBEDDING]
  # On a device, an index past the end would silently give the last row.
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
  """Runs the base on a text; returns the values at each site, on every host.

  Args:
    plan: The plan.
    params: The base's parameters, by path.
    ids: [n] tokens of the text.

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
  """The facts that a resumed run must share: the method and trained shapes."""
  trained = plan.select(plan.trainable)
  # Full tuning trains hundreds of arrays: their number and size are enough.
  shapes = {path: list(x.shape) for path, x in trained.items()}
  if len(shapes) > 8:
    count = sum(math.prod(x.shape) for x in trained.values())
    shapes = {'arrays': len(shapes), 'parameters': count}
  found = {'method': plan.method.name, 'trainable': shapes}
  # Methods without settings have no such entry.
  settings = dict(plan.method.settings)
  return found | ({'settings': settings} if settings else {})
