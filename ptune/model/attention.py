"""T5's attention: softmax, relative position bias and heads.

Shapes: b batch, q and k query and key length, h heads, d kv (head size).
Softmax and logits are float32, whatever the compute dtype.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from ptune.model import cache, fused, tpu, tpu_sublayer
from ptune.model.adapters import Placement, adapt, placed
from ptune.model.fused import MASKED
from ptune.model.layers import (
  Dense,
  Initializer,
  LayerNorm,
  constrain,
  kernel_init,
  product,
  untouched,
)
from ptune.model.sizes import T5Config

# The kernels of queries, keys and values, and their sites.
PROJECTIONS = ('query', 'key', 'value')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def exponentials(
  dtype: jnp.dtype, logits: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The numerators of a softmax, and their sum.

  The backward pass keeps the numerators only.

  Args:
    dtype: Type of the exponentials; they are computed in float32.
    logits: [..., k] float32.
    mask: Broadcasts to [..., k]; False where the weight is 0. If it is False
      for all k, all have the same weight.

  Returns:
    exp(logits - their maximum), [..., k] in dtype, and the sum of these rounded
    numbers, [...] float32.
  """
  logits = jnp.where(mask, logits, MASKED)
  most = jnp.max(logits, axis=-1, keepdims=True)
  y = jnp.exp(logits - most).astype(dtype)
  return y, jnp.sum(y, axis=-1, dtype=jnp.float32)


def _exponentials_forward(dtype, logits, mask):
  y, total = exponentials(dtype, logits, mask)
  return (y, total), y


def _exponentials_backward(dtype, y, cotangents):
  del dtype
  dy, dtotal = cotangents
  # The maximum has no gradient: it cancels when the sum divides.
  return (dy.astype(jnp.float32) + dtotal[..., None]) * y, None


exponentials.defvjp(_exponentials_forward, _exponentials_backward)


def relative_position_bucket(
  relative_position: np.ndarray,
  bidirectional: bool,
  num_buckets: int,
  max_distance: int,
) -> np.ndarray:
  """Sorts distances into buckets: exact when near, logarithmic when far.

  Computed in NumPy while the program is traced, because a logarithm that rounds
  differently on another device would move a distance into the next bucket.

  Args:
    relative_position: Key position minus query position, integers of any shape.
    bidirectional: Whether keys after the query have their own buckets (the
      upper half); otherwise they share bucket 0.
    num_buckets: Number of buckets.
    max_distance: Distances from here on are in the last bucket.

  Returns:
    The bucket of each distance, int32.

  Source: T5 (arXiv 1910.10683), section 2.1.
  """
  distance = -np.asarray(relative_position)
  offset = np.zeros_like(distance)
  if bidirectional:
    num_buckets //= 2
    offset = np.where(distance < 0, num_buckets, 0)
    distance = np.abs(distance)
  distance = np.maximum(distance, 0)
  exact = num_buckets // 2
  # The maximum avoids log(0); near distances do not use this branch.
  ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
  # T5 adds this epsilon, which lifts exact powers into the next bucket.
  ratio = ratio + np.finfo(np.float32).eps
  scale = (num_buckets - exact) / np.log(max_distance / exact)
  far = exact + (np.log(ratio) * scale).astype(np.int32)
  far = np.minimum(far, num_buckets - 1)
  return (offset + np.where(distance < exact, distance, far)).astype(np.int32)


class RelativePositionBias(nn.Module):
  """A learned bias for each head and bucket of distances."""

  num_heads: int
  bidirectional: bool
  num_buckets: int = 32
  max_distance: int = 128

  @nn.compact
  def __call__(self, length: int) -> jax.Array:
    """Returns the bias among `length` positions, [1, heads, q, k] float32."""
    table = partitioning.param_with_axes(
      'rel_embedding',
      nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform'),
      (self.num_heads, self.num_buckets),
      jnp.float32,
      axes=('heads', 'relpos_buckets'),
    )
    buckets = relative_position_bucket(
      np.arange(1 - length, length),
      self.bidirectional,
      self.num_buckets,
      self.max_distance,
    )
    positions = jnp.arange(length)
    # [q, k], of which `buckets` starts with the least.
    distance = positions[None, :] - positions[:, None] + length - 1
    table = table.astype(jnp.float32)
    if tpu.platform() == 'tpu':
      return _by_product(table, buckets, distance)[None]
    # [heads, 2 * length - 1] -> [heads, q, k]
    return jnp.take(jnp.take(table, buckets, axis=1), distance, axis=1)[None]


def _by_product(
  table: jax.Array, buckets: np.ndarray, distance: jax.Array
) -> jax.Array:
  """table[:, buckets[distance]], exactly, without looking up.

  A TPU is slow at looking up, and does not store the zeros and ones of this
  product. Each bucket is an interval of distances.
  """
  members = buckets == np.arange(table.shape[1])[:, None]
  first = np.argmax(members, axis=1)[:, None, None]
  end = first + np.sum(members, axis=1)[:, None, None]
  chosen = (first <= distance[None]) & (distance[None] < end)
  return jnp.einsum(
    'hn,nqk->hqk', table, chosen.astype(jnp.float32), precision='highest'
  )


def relative_bias(
  config: T5Config, bidirectional: bool, name: str = 'relpos_bias'
) -> RelativePositionBias:
  """The position bias of a stack, or of a layer, by its configuration."""
  return RelativePositionBias(
    config.num_heads,
    bidirectional,
    config.relative_attention_num_buckets,
    config.relative_attention_max_distance,
    name=name,
  )


def join_rows(
  n: int,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  bias: jax.Array,
  mask: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """Joins every n rows to one, whose queries attend to keys of their own row.

  Keys of other rows have a bias of -inf, so that their weights are 0 even where
  the mask allows no key at all.

  Args:
    n: Divides the batch.
    q: [b, q, h, d].
    k: [b, k, h, d].
    v: [b, k, h, d].
    bias: [1, h, q, k].
    mask: Broadcasts to [b, h, q, k].

  Returns:
    The same with [b / n, n * q, ...] and [b / n, n * k, ...].
  """
  plane = q.shape[1], k.shape[1]
  mask = jnp.broadcast_to(mask, (q.shape[0], mask.shape[1], *plane))
  mask = mask.reshape(-1, n, *mask.shape[1:]).swapaxes(1, 2)
  # [..., q, k] -> [..., n, q, n, k]
  own = jnp.eye(n, dtype=bool)[None, None, :, None, :, None]
  mask = mask[..., None, :] | ~own
  bias = jnp.where(own, bias[:, :, None, :, None], -jnp.inf)
  plane = n * plane[0], n * plane[1]
  bias, mask = (x.reshape(*x.shape[:2], *plane) for x in (bias, mask))
  q, k, v = (x.reshape(-1, n * x.shape[1], *x.shape[2:]) for x in (q, k, v))
  return q, k, v, bias, mask


def project_heads(
  attention: nn.Module,
  placements: tuple[Placement, ...],
  site: str,
  x: jax.Array,
  shape: tuple[int, int],
  dtype: jnp.dtype,
  axis: str = 'heads',
  init: Initializer = kernel_init,
) -> jax.Array:
  """Projects queries, keys or values: [b, t, embed] -> [b, t, h, d].

  Args:
    attention: The module that owns the kernel.
    placements: All placements of the network.
    site: 'query', 'key' or 'value': the name of the site and of the kernel.
    x: [b, t, embed].
    shape: (h, d).
    dtype: What the product is computed in.
    axis: The logical axis of the heads.
    init: Initialiser of the kernel.
  """
  width = shape[0] * shape[1]
  axes = ('embed', 'joined_kv')
  y = Dense(width, axes, dtype, kernel_init=init, name=site)(x)
  y = y.reshape(*y.shape[:-1], *shape)
  y = constrain(y, 'batch', 'length', axis, 'kv')
  return adapt(attention, placements, site, x, y)


def project_out(
  attention: nn.Module,
  placements: tuple[Placement, ...],
  y: jax.Array,
  features: int,
  dtype: jnp.dtype,
) -> jax.Array:
  """The output projection: [b, q, h, ..., d] -> [b, q, features].

  Args:
    attention: The module that owns the kernel.
    placements: All placements of the network.
    y: What the heads return.
    features: Width of the residual stream.
    dtype: What the product is computed in.
  """
  y = y.reshape(*y.shape[:2], -1)
  out = Dense(features, ('joined_kv', 'embed'), dtype, name='out')(y)
  return adapt(attention, placements, 'out', y, out)


def all_keys(
  attention: nn.Module,
  placements: tuple[Placement, ...],
  x: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array,
  *,
  queries: int,
  cache_index: jax.Array | None,
  prefill: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """All keys and values that are attended to: cached and inserted ones too.

  Args:
    attention: The module that owns the cache and the sites.
    placements: All placements of the network.
    x: [b, k, embed] input of the keys and values.
    k: [b, k, h, d].
    v: [b, k, h, d].
    mask: Broadcasts to [b, h, q, k].
    queries: Number of queries.
    cache_index: As in `Attention`.
    prefill: As in `Attention`.

  Returns:
    Keys and values, and the mask: what adapters put before the keys is visible
    to every query.
  """
  if cache_index is not None:
    k, v = cache.keys_and_values(attention, k, v, cache_index, prefill)
  elif queries == 1:
    k, v = cache.constant(k, v)
  k = adapt(attention, placements, 'keys', x, k)
  v = adapt(attention, placements, 'values', x, v)
  added = k.shape[1] - mask.shape[-1]
  mask = jnp.pad(mask, [(0, 0)] * 3 + [(added, 0)], constant_values=True)
  return k, v, mask


class Attention(nn.Module):
  """Multi-head attention. T5 does not scale its logits by the head size.

  Sites: `query`, `key`, `value` [batch, length, heads, kv], the projections;
  `keys`, `values` [batch, k, heads, kv], all keys and values that are attended
  to, the cached ones included; `out` [batch, length, embed].

  With `fused`, an accelerator's fused kernel computes it, if one fits; None
  follows `fused.DEFAULT`.
  """

  num_heads: int
  head_dim: int
  dtype: jnp.dtype = jnp.float32
  dropout_rate: float = 0.0
  placements: tuple[Placement, ...] = ()
  fused: bool | None = None

  @nn.compact
  def __call__(
    self,
    inputs_q: jax.Array,
    inputs_kv: jax.Array,
    mask: jax.Array,
    bias: jax.Array | None = None,
    *,
    cache_index: jax.Array | None = None,
    prefill: bool = False,
    enable_dropout: bool = False,
    around: tuple[jax.Array, jax.Array | None] | None = None,
  ) -> jax.Array:
    """Attends from each query position to the keys that the mask allows.

    Args:
      inputs_q: [batch, q, embed].
      inputs_kv: [batch, k, embed].
      mask: Broadcasts to [batch, heads, q, k]; True where a query may attend.
      bias: Broadcasts to [batch, heads, q, k], added to the logits.
      cache_index: In cached decoding, the position of the query. The collection
        `cache` keeps the keys and values of all positions. The first call, at
        position 0, makes the cache for as many positions as its inputs have.
      prefill: Whether the first call writes its own keys and values to it.
      enable_dropout: Whether attention weights are dropped.
      around: If `fuses`: the scale [embed] of the norm and the dropout [batch,
        1, embed] of the output or None. Then it computes the whole sublayer:
        both inputs are the residual stream, and so is the output.

    Returns:
      [batch, q, embed].
    """
    if around is not None:
      return self._sublayer(inputs_q, mask, bias, enable_dropout, *around)
    q = self._project('query', inputs_q)
    if cache_index is None and self._absorbs(inputs_q, inputs_kv):
      y = self._absorbed(q, inputs_kv, mask, bias, enable_dropout)
    else:
      y = self._attended(
        q, inputs_kv, mask, bias, cache_index, prefill, enable_dropout
      )
    return project_out(self, self.placements, y, inputs_q.shape[-1], self.dtype)

  def fuses(
    self, x: jax.Array, mask: jax.Array, bias: jax.Array | None
  ) -> bool:
    """Whether kernels can compute a sublayer of self-attention.

    Args:
      x: [batch, length, embed], the residual stream.
      mask: As in a call.
      bias: As in a call.
    """
    heads = (*x.shape[:2], self.num_heads, self.head_dim)
    q = jax.ShapeDtypeStruct(heads, self.dtype)
    sites = (*PROJECTIONS, 'keys', 'values')
    return (
      untouched(self, self.placements, PROJECTIONS, sites)
      and fused.fits(self.fused, q, q, bias, mask)
      and self._fits(x, len(PROJECTIONS))
    )

  def _fits(self, x: jax.Array, matrices: int) -> bool:
    """Whether a kernel can compute so many of the sublayer's products."""
    width = self.num_heads * self.head_dim
    return fused.fits_sublayer(
      self.fused, self.dtype, x.shape, width, matrices, 'joined_kv'
    )

  def _sublayer(self, x, mask, bias, enable_dropout, scale, kept_out):
    """Norm, self-attention and residual connection: [b, t, embed]."""
    params = self.variables['params']
    wi = tuple(params[name]['kernel'] for name in PROJECTIONS)
    weights = tpu_sublayer.Weights(scale, wi)
    x, projected = fused.project(x, weights, LayerNorm.epsilon)
    q, k, v = (
      y.reshape(*y.shape[:2], self.num_heads, self.head_dim) for y in projected
    )
    kept = self._kept(v, enable_dropout)
    y = fused.attend(q, k, v, bias, mask, kept)
    if untouched(self, self.placements, ('out',), ('out',)) and self._fits(
      x, 1
    ):
      wo = self.variables['params']['out']['kernel']
      weights = tpu_sublayer.Weights(wo=wo, kept_out=kept_out)
      return fused.output(x, y.reshape(*x.shape[:2], -1), weights)
    y = project_out(self, self.placements, y, x.shape[-1], self.dtype)
    return x + (y if kept_out is None else (y * kept_out).astype(y.dtype))

  def _project(self, site: str, x: jax.Array) -> jax.Array:
    """Makes queries, keys or values: [b, t, embed] -> [b, t, h, d]."""
    init = kernel_init
    if site == 'query':
      # T5 divides the kernel by sqrt(d) at the start, in place of the logits.
      init = lambda *args: kernel_init(*args) * self.head_dim**-0.5
    shape = (self.num_heads, self.head_dim)
    return project_heads(
      self, self.placements, site, x, shape, self.dtype, init=init
    )

  def _weights(self, logits, mask, bias):
    """Logits [b, h, q, k] -> exponentials, and their sums [b, h, q, 1]."""
    if bias is not None:
      logits = logits + bias
    weights, total = exponentials(self.dtype, logits, mask)
    return weights, total[..., None]

  def _kept(self, keys: jax.Array, enable_dropout: bool) -> jax.Array | None:
    """The dropout of keys [b, k, ...], [b, h, k, 1], or None for none.

    As in T5X, dropout drops a key for all queries of a head, or for none.
    """
    if not enable_dropout or not self.dropout_rate:
      return None
    # Drawn without the last axis, for which a TPU would use an eighth of its
    # registers. The draws are the same.
    shape = (keys.shape[0], self.num_heads, keys.shape[1])
    dropout = nn.Dropout(self.dropout_rate, deterministic=False)
    return dropout(jnp.ones(shape, self.dtype))[..., None]

  def _attended(self, q, x, mask, bias, cache_index, prefill, enable_dropout):
    """Attends to x: q [b, q, h, d], x [b, k, embed] -> [b, q, h, d]."""
    k = self._project('key', x)
    v = self._project('value', x)
    k, v, mask = all_keys(
      self,
      self.placements,
      x,
      k,
      v,
      mask,
      queries=q.shape[1],
      cache_index=cache_index,
      prefill=prefill,
    )
    if bias is not None:  # Inserted keys have a bias of 0.
      bias = jnp.pad(bias, [(0, 0)] * 3 + [(k.shape[1] - bias.shape[-1], 0)])
    kept = self._kept(v, enable_dropout)
    if cache_index is None and fused.fits(self.fused, q, k, bias, mask):
      return fused.attend(q, k, v, bias, mask, kept)
    shape = q.shape
    n = fused.rows_joined(self.fused, q, k, bias)
    if n > 1:
      assert bias is not None
      q, k, v, bias, mask = join_rows(n, q, k, v, bias, mask)
    if kept is not None:  # Dropping the value drops the weight.
      v = v * kept.swapaxes(1, 2).reshape(*v.shape[:3], 1)
    # Keys first, because the backward pass of the other order needs a bfloat16
    # product that XLA's CPU backend lacks. -> [b, h, q, k]
    logits = product('bkhd,bqhd->bhqk', k, q)
    weights, total = self._weights(logits, mask, bias)
    # Dividing by the sum last takes fewer divisions.
    # [b, q, h, d] / [b, q, h, 1]
    y = product('bhqk,bkhd->bqhd', weights, v) / total.swapaxes(1, 2)
    return y.astype(self.dtype).reshape(shape)

  def _absorbs(self, inputs_q: jax.Array, inputs_kv: jax.Array) -> bool:
    """Whether `_absorbed` is used, which computes no keys and values.

    Not in float32, where the order of T5's operations is kept. Not if an
    adapter or an analysis reads the sites of keys and values. Not in cached
    decoding, which computes keys and values only once.
    """
    (queries, embed), keys = inputs_q.shape[1:], inputs_kv.shape[1]
    sites = ('key', 'value', 'keys', 'values')
    # What a head keeps in memory, without and with keys and values.
    kept, made = queries * embed, keys * self.head_dim
    return (
      self.dtype != jnp.float32
      and queries > 1
      and kept <= made
      # At most half the multiplications, because smaller products are slower.
      and 2 * kept * (keys + self.head_dim) < made * (embed + queries)
      and not self.is_mutable_collection('intermediates')
      and not any(placed(self, self.placements, site) for site in sites)
    )

  def _absorbed(self, q, x, mask, bias, enable_dropout):
    """Multiplies the key and value kernels into the queries.

        (x K) q = x (K q),    w (x V) = (w x) V

    When targets are much shorter than inputs, this takes less than half the
    multiplications. q [b, q, h, d], x [b, k, embed] -> [b, q, h, d].

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2, for decoding.
    """
    heads, x = (self.num_heads, self.head_dim), x.astype(self.dtype)

    def asked_of(x, kernel, scale):
      asked = q
      if scale is not None:
        asked = (q * scale.reshape(1, 1, *heads)).astype(q.dtype)
      kernel = kernel.reshape(-1, *heads).astype(q.dtype)
      # -> [b, q, h, i]
      asked = product('bqhd,ihd->bqhi', asked, kernel).astype(x.dtype)
      return constrain(asked, 'batch', 'length', 'heads', 'embed')

    def values_of(x, kernel, scale):
      kernel = kernel.reshape(-1, *heads).astype(x.dtype)
      y = product('ihd,bhqi->bqhd', kernel, seen)
      if total is not None:
        y = y / total.swapaxes(1, 2)
      return y if scale is None else y * scale.reshape(1, 1, *heads)

    axes, width = ('embed', 'joined_kv'), self.num_heads * self.head_dim
    project = functools.partial(Dense, width, axes, self.dtype)
    asked = project(name='key')(x, asked_of)
    kept = self._kept(x, enable_dropout)
    if bias is None and fused.fits_absorbed(self.fused, asked, x, mask):
      seen, total = fused.attend_absorbed(asked, x, mask, kept), None
    else:
      logits = product('bki,bqhi->bhqk', x, asked)
      weights, total = self._weights(logits, mask, bias)
      if kept is not None:
        weights = weights * kept.swapaxes(2, 3)
      # -> [b, h, q, i]
      seen = product('bki,bhqk->bhqi', x, weights).astype(x.dtype)
    seen = constrain(seen, 'batch', 'heads', 'length', 'embed')
    y = project(name='value')(x, values_of)  # -> [b, q, h, d]
    return constrain(y, 'batch', 'length', 'heads', 'kv')
