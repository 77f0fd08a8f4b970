"""How much a method trains, counted without building a model.

A network of one encoder and one decoder layer is traced for its shapes, and its
layers are counted as often as there are.
"""

import functools
import math

from ptune.model import network, structure
from ptune.model.adapters import Method, Placement
from ptune.model.sizes import Config


def counts(config: Config, method: Method) -> tuple[int, int]:
  """How many parameters a method trains, and how many the base model has.

  Args:
    config: The sizes of the model.
    method: Treats all layers of a stack alike.
  """
  trained = {
    path: x
    for path, x in _parameters(config, method.placements).items()
    if method.trains(path)
  }
  return sum(trained.values()), sum(_parameters(config, ()).values())


@functools.cache
def _parameters(
  config: Config, placements: tuple[Placement, ...]
) -> dict[str, int]:
  """Sizes by path, where layer 0 stands for all of its stack."""
  one = network.Transformer(config.with_depth(1, 1), placements)
  params = structure.parameters(one)
  layers = {
    'encoder/layers_0/': config.num_encoder_layers,
    'decoder/layers_0/': config.num_decoder_layers,
  }
  return {
    path: math.prod(x.shape)
    * next((n for layer, n in layers.items() if path.startswith(layer)), 1)
    for path, x in params.items()
  }
