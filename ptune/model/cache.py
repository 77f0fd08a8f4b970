"""The cache of a decoder that generates one token per call.

The first call makes the cache, with room for as many positions as it gets.
Each later call gets one token, writes the keys and values of its position and
attends to those of all positions. The leaves have T5X's names, because T5X's
beam search must know which of them all rows share.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax


class Positions(NamedTuple):
  """The positions of one decoder call.

  Attributes:
    queries: [q] the positions that the call computes.
    keys: [k] the positions that they may attend to: the same ones, or all
      positions of the cache.
    cache_index: In cached decoding, the position of the query; 0 in the call
      that makes the cache, and None without a cache.
    in_step: Whether the call takes one token and reads the cache.
  """

  queries: jax.Array
  keys: jax.Array
  cache_index: jax.Array | None = None
  in_step: bool = False


def positions(
  decoder: nn.Module, length: int, added: int, decode: bool
) -> Positions:
  """Finds out where a decoder call is, and moves the cache on.

  Args:
    decoder: The module whose cache it is.
    length: Positions of the call's input, without a cache or to make one.
    added: How many of them come before the tokens (a decoder prompt). The call
      that makes the cache fills them in, so decoding starts after them.
    decode: Whether the call decodes with a cache.
  """
  if not decode or not decoder.has_variable('cache', 'cache_index'):
    each = jnp.arange(length)
    if not decode:
      return Positions(each, each)
    index = jnp.zeros((), jnp.int32)
    decoder.put_variable('cache', 'cache_index', index + added)
    return Positions(each, each, index)
  index = decoder.get_variable('cache', 'cache_index')
  decoder.put_variable('cache', 'cache_index', index + 1)
  # Either leaf tells the cache's length: `bias` or `keep_length` wrote it.
  found = decoder.has_variable('cache', 'cached_bias')
  leaf = 'cached_bias' if found else 'position_embedder_index'
  room = decoder.get_variable('cache', leaf).shape[-1]
  return Positions(index[None], jnp.arange(room), index, in_step=True)


def keep_length(decoder: nn.Module, positions: Positions) -> None:
  """Stores the cache's length, for decoders that cache no bias."""
  if positions.cache_index is not None and not positions.in_step:
    decoder.put_variable('cache', 'position_embedder_index', positions.keys)


def bias(
  module: nn.Module,
  compute: Callable[[int], jax.Array],
  length: int,
  cache_index: jax.Array | None,
) -> jax.Array:
  """A decoder's position bias, [1, heads, q, k].

  Args:
    module: The module whose cache keeps the bias: a decoder or a layer.
    compute: Makes the bias among a number of positions, [1, heads, q, k].
    length: That number, until the bias is cached.
    cache_index: In cached decoding, the position of the query.
  """
  if cache_index is not None and module.has_variable('cache', 'cached_bias'):
    cached = module.get_variable('cache', 'cached_bias')
    # [1, heads, length, length] -> [1, heads, 1, length]
    return lax.dynamic_slice_in_dim(cached, cache_index, 1, axis=2)
  computed = compute(length)
  if cache_index is not None:
    module.put_variable('cache', 'cached_bias', computed)
  return computed


def keys_and_values(
  attention: nn.Module,
  k: jax.Array,
  v: jax.Array,
  index: jax.Array,
  prefill: bool,
) -> tuple[jax.Array, jax.Array]:
  """Writes one position into the cache and returns all positions.

  The cache stores [batch, heads, kv, k], the layout that both matrix products
  of attention read without a transposition.

  Args:
    attention: The module whose cache it is.
    k: [batch, k, heads, kv] the keys of the call's own positions.
    v: [batch, k, heads, kv] the values of these positions.
    index: The position to write to.
    prefill: Whether the call that makes the cache writes k and v into it.
  """
  filled = attention.has_variable('cache', 'cached_key')
  found = []
  for name, x in (('cached_key', k), ('cached_value', v)):
    x = _keys_last(x)
    start = x if prefill else jnp.zeros_like(x)
    cache = attention.variable('cache', name, lambda start=start: start)
    if filled:
      cache.value = lax.dynamic_update_slice(
        cache.value, x.astype(cache.value.dtype), (0, 0, 0, index)
      )
    found.append(_keys_first(cache.value))
  return found[0], found[1]


def constant(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Keys and values that are the same in every step of a decoding loop.

  XLA moves the operations before this barrier out of the loop. Without the
  barrier, it transposes keys and values again in every step.
  """
  kept = lax.optimization_barrier((_keys_last(k), _keys_last(v)))
  return _keys_first(kept[0]), _keys_first(kept[1])


def _keys_last(x: jax.Array) -> jax.Array:
  """[batch, k, heads, kv] -> [batch, heads, kv, k]."""
  return jnp.moveaxis(x, 1, -1)


def _keys_first(x: jax.Array) -> jax.Array:
  """[batch, heads, kv, k] -> [batch, k, heads, kv]."""
  return jnp.moveaxis(x, -1, 1)
