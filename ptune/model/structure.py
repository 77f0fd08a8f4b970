"""The structure of a network: its parameters and its sites.

Tracing the network gives their names and shapes, and computes nothing.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from ptune.errors import UserError
from ptune.model import scan
from ptune.model.adapters import matches
from ptune.model.network import Transformer
from ptune.model.sizes import Config


def unrolled(network: Transformer) -> Transformer:
  """The same network without scan, whose parameters have T5X's names."""
  return network.clone(config=dataclasses.replace(network.config, scan=False))


def _abstract(network: Transformer) -> Mapping[str, Any]:
  """The shapes of all variables that one call creates."""
  without = dataclasses.replace(network.config, scan=False, dropout_rate=0.0)
  return _traced(network.clone(config=without))


@functools.lru_cache(maxsize=8)  # Tracing takes a CPU second and more.
def _traced(network: Transformer) -> Mapping[str, Any]:
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  init = functools.partial(network.init, mutable=True, enable_dropout=False)
  return jax.eval_shape(init, jax.random.key(0), tokens, tokens, tokens)


def parameters(network: Transformer) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and type of every parameter, by path.

  Raises:
    UserError: If a placement matches no site of the network, or, in a network
      that scans its layers, matches some layers only.
  """
  known = sites(network)
  if network.config.with_all_sites != network.config:
    # A method for encoder and decoder uses the sites that exist.
    known += sites(Transformer(network.config.with_all_sites))
  stray = [
    p.site
    for p in network.placements
    if not any(matches(p.site, site) for site in known)
  ]
  if stray:
    raise UserError(
      f'no site of the network matches {stray}; its sites are:\n  '
      + '\n  '.join(known)
    )
  single = [
    p.site
    for p in network.placements
    if any(
      matches(p.site, site) != matches(p.site, scan.of_all(site))
      for site in known
    )
  ]
  if single and network.config.scan:
    raise UserError(
      'SCAN computes all layers by the same program, but some layers have'
      f' adapters that others lack: {single}. Place them in {scan.LAYERS!r}, or'
      ' set SCAN = False'
    )
  return traverse_util.flatten_dict(_abstract(network)['params'], sep='/')


def base_paths(network: Transformer) -> frozenset[str]:
  """The paths of the parameters that the network has without its adapters.

  An adapter is a submodule of the module that owns the site, so its path tells
  it; we need not trace the network a second time.
  """
  added = tuple(
    '/'.join([*site.split('/')[:-1], placement.name, ''])
    for placement in network.placements
    for site in sites(network)
    if matches(placement.site, site)
  )
  return frozenset(p for p in parameters(network) if not p.startswith(added))


def parameter_axes(network: Transformer) -> dict[str, tuple[str, ...]]:
  """Logical axis names of every parameter, by path."""
  axes = _abstract(network)['params_axes']
  flat = traverse_util.flatten_dict(axes, sep='/')
  return {k.removesuffix('_axes'): tuple(v.names) for k, v in flat.items()}


def sites(network: Transformer) -> list[str]:
  """Every place where an adapter can be placed, as a path."""
  sown = _abstract(network)['intermediates']
  flat = traverse_util.flatten_dict(sown, sep='/')
  return sorted(path.removesuffix('_site') for path in flat)


def read_sites(
  config: Config, params: Mapping[str, Any], tokens: jax.Array
) -> dict[str, jax.Array]:
  """Computes the values at each site of a model without adapters, in float32.

  Args:
    config: Sizes of the model.
    params: Its parameters, by path.
    tokens: [batch, length] the encoder's tokens. The decoder reads its start
      token only.

  Returns:
    The values by the path of the site.
  """
  plain = dataclasses.replace(config, dtype='float32', scan=False)
  start = jnp.full((tokens.shape[0], 1), config.ids.start, jnp.int32)
  _, sown = Transformer(plain).apply(
    {'params': traverse_util.unflatten_dict(dict(params), sep='/')},
    tokens,
    start,
    jnp.full_like(start, config.ids.eos),
    enable_dropout=False,
    mutable=['intermediates'],
  )
  flat = traverse_util.flatten_dict(sown['intermediates'], sep='/')
  return {path.removesuffix('_site'): x for path, (x, *_) in flat.items()}
