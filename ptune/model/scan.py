"""The layers of a stack as one loop, for `scan` of a model's config.

The body of the loop is compiled once and reads the stacked parameters of all
layers. Outside of compiled programs, parameters have T5X's names, one set for
each layer:

    encoder/layers_0/mlp/wo/kernel   [mlp, embed]
    encoder/layers_1/mlp/wo/kernel   [mlp, embed]
    -> encoder/layers_*/mlp/wo/kernel   [2, mlp, embed]
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from ptune.errors import UserError

# The name of the stacked layers. The site pattern `layers_*` matches it too.
LAYERS = 'layers_*'
_LAYER = re.compile(r'(?<=/)layers_(\d+)(?=/)')


def of_all(path: str) -> str:
  """'encoder/layers_3/mlp/wo/kernel' -> 'encoder/layers_*/mlp/wo/kernel'."""
  return _LAYER.sub(LAYERS, path)


def groups(paths: Iterable[str]) -> dict[str, list[str]]:
  """Groups the paths of layers: {path of the stack: paths in layer order}.

  {'encoder/layers_*/a': ['encoder/layers_0/a', 'encoder/layers_1/a'], ...}
  """
  found: dict[str, dict[int, str]] = {}
  for path in paths:
    layer = _LAYER.search(path)
    if layer:
      found.setdefault(of_all(path), {})[int(layer[1])] = path
  return {
    name: [of[number] for number in sorted(of)] for name, of in found.items()
  }


def stacked(params: Mapping[str, Any]) -> dict[str, Any]:
  """Stacks the parameters of layers; keeps stacked ones unchanged.

  {'encoder': {'layers_0': {'a': x}, 'layers_1': {'a': y}}}
  -> {'encoder': {'layers_*': {'a': [x, y]}}}
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  for name, paths in groups(flat).items():
    flat[name] = jnp.stack([flat.pop(path) for path in paths])
  return traverse_util.unflatten_dict(flat, sep='/')


def check_trainable(
  method: str, paths: Iterable[str], trainable: frozenset[str]
) -> None:
  """Raises a UserError if a parameter is trained in some layers only."""
  for layers in groups(paths).values():
    trained = trainable.intersection(layers)
    if trained and len(trained) < len(layers):
      raise UserError(
        f'SCAN computes all layers by the same program, but method {method!r}'
        f' trains some of them only: {sorted(trained)}. Set SCAN = False'
      )


def through_layers(
  layer: Callable[..., nn.Module],
  count: int,
  x: jax.Array,
  arrays: tuple[jax.Array, ...],
  *,
  each: tuple[np.ndarray, ...] = (),
  remat: bool,
  scans: bool,
  **options,
) -> jax.Array:
  """Calls layers one after the other: x = layer(x, *arrays, **options).

  Args:
    layer: Makes a layer, called with `name=` in the module that owns it.
    count: Number of layers.
    x: Input of the first layer.
    arrays: Arguments of every layer.
    each: Arrays [layers, ...]. After `arrays`, each layer gets its own row.
    remat: Whether the backward pass keeps only the inputs of layers, and
      computes the layers again.
    scans: Whether to call one layer with stacked parameters in a loop. Sown
      values are then stacked too. In the cache, the axis of layers comes after
      the axis of rows.
    **options: Arguments that are not arrays or have no gradient.

  Returns:
    Output of the last layer.
  """

  def call(module, x, *arrays):
    return module(x, *arrays, **options)

  if remat:
    call = nn.remat(call)
  if not scans:
    for i in range(count):
      own = [rows[i] for rows in each]
      x = call(layer(name=f'layers_{i}'), x, *arrays, *own)
    return x
  loop = nn.scan(
    lambda module, x, *arrays: (call(module, x, *arrays), None),
    variable_axes={'params': 0, 'intermediates': 0, 'cache': 1},
    split_rngs={'dropout': True},
    in_axes=(nn.broadcast,) * len(arrays) + (0,) * len(each),
    length=count,
  )
  return loop(layer(name=LAYERS), x, *arrays, *each)[0]
