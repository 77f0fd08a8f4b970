"""All layers of a stack as one, for T5Config.scan.

The network then computes them in a loop, whose body is compiled once and takes
their parameters stacked. Outside of compiled programs, parameters have T5X's
names, one set for each layer:

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

# The name of all layers together, which the patterns of sites match too.
LAYERS = 'layers_*'
_LAYER = re.compile(r'(?<=/)layers_(\d+)(?=/)')


def of_all(path: str) -> str:
  """'encoder/layers_3/mlp/wo/kernel' -> 'encoder/layers_*/mlp/wo/kernel'."""
  return _LAYER.sub(LAYERS, path)


def groups(paths: Iterable[str]) -> dict[str, list[str]]:
  """The paths within layers, in the order of these, by that of all of them."""
  found: dict[str, dict[int, str]] = {}
  for path in paths:
    layer = _LAYER.search(path)
    if layer:
      found.setdefault(of_all(path), {})[int(layer[1])] = path
  return {
    name: [of[number] for number in sorted(of)] for name, of in found.items()
  }


def stacked(params: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters as the network takes them; what is stacked already is kept.

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
  """Raises a ValueError if a parameter is trained in some layers only."""
  for layers in groups(paths).values():
    trained = trainable.intersection(layers)
    if trained and len(trained) < len(layers):
      raise UserError(
        f'SCAN computes all layers by the same program, and method {method!r}'
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
    layer: Makes one; called with `name=`, in the module that owns them.
    count: How many.
    x: What goes into the first.
    arrays: What each of them takes beside it.
    each: Arrays [layers, ...]: a layer takes, behind `arrays`, its own row.
    remat: Whether the backward pass keeps what goes into a layer only, and
      calls it again.
    scans: Whether one layer, with the parameters of all, is called
      in a loop. What is sown is then stacked as they are; in the cache, layers
      come after the rows.
    **options: What is not an array, or has no gradient.

  Returns:
    What comes out of the last.
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
