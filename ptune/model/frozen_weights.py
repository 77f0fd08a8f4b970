"""Frozen weights on the devices: quantized to int8, stacked for scan.

A quantized matrix is int8. The array `<name>_scale`, float32, has its scales,
one for each output channel (of a kernel) or row (of the embedding): the largest
magnitude over 127. With scan, the layers of a stack share one array, see
`scan`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ptune.model import scan
from ptune.model.parameters import EMBEDDING, Flat, Plan

# The matrices that may be int8, and the axis along which a scale is shared.
_SHARED_AXIS = {'kernel': 0, 'embedding': 1}


def freeze(plan: Plan, frozen: Flat) -> Flat:
  """Turns frozen parameters into the arrays that the network reads.

  Args:
    plan: The plan.
    frozen: The parameters, by path. The dict is emptied so that their memory
      can be freed one by one.

  Returns:
    Arrays, by path: quantized with frozen_dtype 'int8', stacked with scan, and
    the given arrays otherwise.
  """
  found = {}
  quantized = frozenset(_quantized(plan))
  for path in list(frozen):
    if path in quantized:
      value = frozen.pop(path)
      with plan.scope():
        found[path], found[f'{path}_scale'] = jax.jit(
          _to_int8, static_argnums=1, out_shardings=_int8_shardings(plan, path)
        )(value, _SHARED_AXIS[path.split('/')[-1]])
    else:
      found[path] = frozen.pop(path)
  if plan.network.config.scan:
    for name, paths in scan.groups(found).items():
      layers = [found.pop(path) for path in paths]
      sharding = _stacked_sharding(layers[0].sharding)
      found[name] = jax.jit(jnp.stack, out_shardings=sharding)(layers)
  return found


def shapes(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape, type and sharding of what `freeze` returns, by path."""
  structs = shapes_by_layer(plan)
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
  """The sharding of [layers, ...]: every device has its part of each layer."""
  return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def shapes_by_layer(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
  """The same without scan, so with T5X's names."""
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
  """The shardings of the values and of their scales."""
  sharding = plan.params[path].sharding
  assert isinstance(sharding, NamedSharding)
  kept = sharding.spec[1 - _SHARED_AXIS[path.split('/')[-1]]]
  return sharding, NamedSharding(plan.mesh, PartitionSpec(kept))


def _to_int8(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
  # A channel of zeros has no scale to divide by, and stays zero.
  values = jnp.round(x / jnp.where(scale > 0, scale, 1))
  return values.astype(jnp.int8), jnp.squeeze(scale, axis)


def rounded_rows(plan: Plan, rows: np.ndarray) -> np.ndarray:
  """Rounds rows of the token embedding as the network does.

  Args:
    plan: The plan.
    rows: [n, embed] as in the checkpoint.

  Returns:
    [n, embed] float32, rounded as by `freeze` and `layers.Embed`.
  """
  x = jnp.asarray(rows).astype(plan.params[EMBEDDING].dtype)
  if EMBEDDING in _quantized(plan):
    values, scale = _to_int8(x, _SHARED_AXIS['embedding'])
    x = values * scale[:, None]
  return np.asarray(x.astype(plan.network.config.dtype), np.float32)
