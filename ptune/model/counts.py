"""Counts the parameters that a method trains, without building a model.

It traces a network of one encoder and one decoder layer, and multiplies the
counts of these by the numbers of layers.
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
    method: The method. It must treat all layers of a stack alike.
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
  """Counts by path; those of layer 0 include all layers of its stack."""
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
