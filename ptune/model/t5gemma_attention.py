"""T5Gemma's attention: rotary positions, and fewer heads of keys and values.

Shapes: b batch, q and k query and key length, h heads of keys and values, g
query heads that share one of them, d kv (head size).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ptune.model.adapters import Placement
from ptune.model.attention import (
  all_keys,
  exponentials,
  project_heads,
  project_out,
)
from ptune.model.layers import LayerNorm, cap, product
from ptune.model.t5gemma_sizes import Stack, T5GemmaConfig

# The cosines and sines of rotary positions, each [rows, length, kv / 2]
# float32; a single row is for all rows of a batch.
Rotary = tuple[jax.Array, jax.Array]


def rotary(
  positions: jax.Array, head_dim: int, theta: float, factor: float = 1.0
) -> Rotary:
  """Cosines and sines of the angles of rotary positions.

  Args:
    positions: [rows, length].
    head_dim: Size of a head.
    theta: Base of the frequencies.
    factor: Divides the positions.

  Source: Su et al. 2021, "RoFormer" (arXiv 2104.09864), section 3.2.2; the
  factor: Chen et al. 2023 (arXiv 2306.15595).
  """
  powers = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  frequencies = np.float32(1) / np.float32(theta) ** powers / np.float32(factor)
  angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, by: Rotary) -> jax.Array:
  """Rotates the two halves of each head.

  Args:
    x: [batch, length, heads, kv].
    by: The rotations of the positions of x, from `rotary`.
  """
  cos, sin = (angles[:, :, None] for angles in by)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Attention(nn.Module):
  """Attention whose keys and values have fewer heads than the queries.

  Sites: those of `attention.Attention`. `key`, `value`, `keys` and `values`
  have the heads of keys and values. `query` and `key` are the projections
  before norm and rotation; `keys` are behind them.
  """

  config: T5GemmaConfig
  stack: Stack
  placements: tuple[Placement, ...] = ()

  @nn.compact
  def __call__(
    self,
    inputs_q: jax.Array,
    inputs_kv: jax.Array,
    mask: jax.Array,
    positions: Rotary | None = None,
    *,
    context: tuple[jax.Array, jax.Array] | None = None,
    cache_index: jax.Array | None = None,
    prefill: bool = False,
    enable_dropout: bool = False,
  ) -> jax.Array:
    """Attends from each query position to the keys that the mask allows.

    Args:
      inputs_q: [batch, q, embed].
      inputs_kv: [batch, k, embed].
      mask: Broadcasts to [batch, 1, q, k]; True where a query may attend.
      positions: Rotations of queries and keys; None for no rotation.
      context: More inputs of keys and values, [batch, c, embed], and their
        mask, which broadcasts to [batch, 1, q, c]. They share the softmax but
        are not rotated.
      cache_index: As in `attention.Attention`. The cache keeps the keys and
        values of the context too.
      prefill: As in `attention.Attention`.
      enable_dropout: Whether attention weights are dropped.

    Returns:
      [batch, q, embed].
    """
    cfg, stack = self.config, self.stack
    dtype = jnp.dtype(cfg.dtype)
    q = self._rotated('query', inputs_q, positions)
    scalar = cfg.query_scalar or stack.head_dim
    q = q * jnp.asarray(scalar**-0.5, dtype)

    own = inputs_kv.shape[1]
    kept = self.has_variable('cache', 'context_key')
    x = inputs_kv
    if context is not None and not kept:
      x = jnp.concatenate([inputs_kv, context[0]], axis=1)
    k = self._rotated('key', x, positions)
    v = self._project('value', x)
    k, context_k = k[:, :own], k[:, own:]
    v, context_v = v[:, :own], v[:, own:]
    k, v, mask = all_keys(
      self,
      self.placements,
      inputs_kv,
      k,
      v,
      mask,
      queries=q.shape[1],
      cache_index=cache_index,
      prefill=prefill,
    )
    if context is not None and cache_index is not None:
      context_k, context_v = self._cached_context(context_k, context_v)
    if context is not None:
      k = jnp.concatenate([k, context_k], axis=1)
      v = jnp.concatenate([v, context_v], axis=1)
      masks = (
        jnp.broadcast_to(m, (q.shape[0], 1, q.shape[1], m.shape[-1]))
        for m in (mask, context[1])
      )
      mask = jnp.concatenate(list(masks), axis=-1)

    dropout = nn.Dropout(cfg.dropout_rate, deterministic=not enable_dropout)
    # As in T5, dropout drops a key for all queries or for none.
    v = v * dropout(jnp.ones((*v.shape[:3], 1), dtype))
    # g: the query heads that share a head of keys and values.
    group = stack.num_heads // stack.num_kv_heads
    q = q.reshape(*q.shape[:2], stack.num_kv_heads, group, stack.head_dim)
    logits = cap(product('bkhd,bqhgd->bhgqk', k, q), cfg.attention_cap)
    weights, total = exponentials(dtype, logits, mask[:, :, None])
    # [b, h, g, q] -> [b, q, h, g, 1]
    total = jnp.moveaxis(total, -1, 1)[..., None]
    y = (product('bhgqk,bkhd->bqhgd', weights, v) / total).astype(dtype)
    return project_out(self, self.placements, y, inputs_q.shape[-1], dtype)

  def _project(self, site: str, x: jax.Array) -> jax.Array:
    """Makes queries, keys or values: [b, t, embed] -> [b, t, heads, kv]."""
    stack, query = self.stack, site == 'query'
    heads = stack.num_heads if query else stack.num_kv_heads
    return project_heads(
      self,
      self.placements,
      site,
      x,
      (heads, stack.head_dim),
      jnp.dtype(self.config.dtype),
      axis='heads' if query else 'kv_heads',
    )

  def _rotated(
    self, site: str, x: jax.Array, positions: Rotary | None
  ) -> jax.Array:
    """Queries or keys, normed in version 2 and rotated.

    The context, behind the positions, is not rotated.
    """
    y = self._project(site, x)
    if self.config.version == 2:
      dtype = jnp.dtype(self.config.dtype)
      y = LayerNorm(dtype, offset=1.0, axis='kv', name=f'{site}_norm')(y)
    if positions is None:
      return y
    length = positions[0].shape[1]
    turned = rotate(y[:, :length], positions)
    return jnp.concatenate([turned, y[:, length:]], axis=1)

  def _cached_context(
    self, k: jax.Array, v: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """The context's keys and values from the call that made the cache."""
    return (
      self.variable('cache', 'context_key', lambda: k).value,
      self.variable('cache', 'context_value', lambda: v).value,
    )
