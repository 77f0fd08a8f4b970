"""The encoder and the decoder of T5Gemma and T5Gemma 2.

T5Gemma (arXiv 2504.06225) is Gemma 2 as an encoder-decoder; T5Gemma 2 (arXiv
2512.14856) is Gemma 3. Unlike T5, they have

- rotary positions, and no position bias;
- fewer heads of keys and values than of queries;
- local layers, which see a window of positions, among global ones;
- a norm before and one behind each sublayer, whose stored scale is its
  distance from 1;
- logits that are capped by tanh.

Sites, parameter names and calls are those of `network`. The embeddings are
multiplied by sqrt(d). T5Gemma does so behind the site `encoder/embed`: a prompt
is multiplied as the tokens are, and its numbers are of the size of the
embedding's. T5Gemma 2 does so in the lookup, before the site: a prompt is read
as it is, and its numbers are sqrt(d) times as large. PEFT puts prompts in the
same places, so a prompt means the same there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from ptune.model import scan
from ptune.model.adapters import PADDING, Placement, adapt
from ptune.model.attention import cached, exponentials, unchanging
from ptune.model.layers import (
  Dense,
  Embed,
  LayerNorm,
  Mlp,
  constrain,
  grow,
  product,
  refuse_packing,
)
from ptune.model.t5gemma_sizes import Stack, T5GemmaConfig

# The cosines and sines of rotary positions, each [rows, length, kv / 2]
# float32; one row stands for all.
Rotary = tuple[jax.Array, jax.Array]


class ImageAwareEmbed(Embed):
  """The embedding of T5Gemma 2: rows times sqrt(d), and one of its own.

  The token that ends an image has a vector beside the table, which is not
  multiplied.
  """

  eoi_id: int = 0

  def setup(self):
    super().setup()
    self.eoi_embedding = partitioning.param_with_axes(
      'eoi_embedding',
      nn.initializers.normal(stddev=1.0),
      (self.features,),
      jnp.float32,
      axes=('embed',),
    )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Looks up rows: [...] -> [..., embed]."""
    x = _times_root(super().__call__(tokens), self.features)
    own = self.eoi_embedding.astype(x.dtype).reshape((1,) * tokens.ndim + (-1,))
    return jnp.where((tokens == self.eoi_id)[..., None], own, x)


def embedder(config: T5GemmaConfig, stack: Stack) -> Embed:
  """The token embedding of a stack."""
  dtype = jnp.dtype(config.dtype)
  if config.version == 1:
    return Embed(config.vocab_size, stack.emb_dim, dtype)
  return ImageAwareEmbed(config.vocab_size, stack.emb_dim, dtype, config.eoi_id)


def _times_root(x: jax.Array, width: int) -> jax.Array:
  """x times sqrt(width), which is rounded to the type of x."""
  return x * jnp.asarray(width**0.5, x.dtype)


def cap(logits: jax.Array, most: float | None) -> jax.Array:
  """Bends logits smoothly so that none goes beyond `most`."""
  return logits if most is None else most * jnp.tanh(logits / most)


def rotary(
  positions: jax.Array, head_dim: int, theta: float, factor: float = 1.0
) -> Rotary:
  """Cosines and sines of the angles by which positions are turned.

  Args:
    positions: [rows, length].
    head_dim: Size of a head.
    theta: The base of the frequencies.
    factor: What positions are divided by.

  Source: Su et al. 2021, "RoFormer" (arXiv 2104.09864), section 3.2.2; the
  factor: Chen et al. 2023 (arXiv 2306.15595).
  """
  powers = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  frequencies = np.float32(1) / np.float32(theta) ** powers / np.float32(factor)
  angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, by: Rotary) -> jax.Array:
  """Turns the two halves of each head into one another.

  Args:
    x: [batch, length, heads, kv].
    by: Of the positions of x.
  """
  cos, sin = (angles[:, :, None] for angles in by)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Attention(nn.Module):
  """Attention whose keys and values have fewer heads than the queries.

  Sites: those of `Attention`; `key`, `value`, `keys` and `values` have
  the heads of keys and values. `query` and `key` are what is projected, before
  norm and rotation; `keys` are those that are attended to.
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
      mask: Broadcasts to [batch, 1, q, k]; True where a query may look.
      positions: Of queries and keys, which are then turned.
      context: More that is attended to, under the same softmax, and its mask:
        [batch, c, embed], which is not turned, and what broadcasts to [batch,
        1, q, c].
      cache_index: As in `Attention`. The keys and values of the context
        are kept, too.
      prefill: As in `Attention`.
      enable_dropout: Whether attention weights are dropped.

    Returns:
      [batch, q, embed].
    """
    cfg, stack = self.config, self.stack
    dtype = jnp.dtype(cfg.dtype)
    q = self._turned('query', inputs_q, positions)
    scalar = cfg.query_scalar or stack.head_dim
    q = q * jnp.asarray(scalar**-0.5, dtype)

    own = inputs_kv.shape[1]
    kept = self.has_variable('cache', 'context_key')
    x = inputs_kv
    if context is not None and not kept:
      x = jnp.concatenate([inputs_kv, context[0]], axis=1)
    k = self._turned('key', x, positions)
    v = self._project('value', x)
    k, context_k = k[:, :own], k[:, own:]
    v, context_v = v[:, :own], v[:, own:]
    if cache_index is not None:
      k, v = cached(self, k, v, cache_index, prefill)
      if context is not None:
        context_k, context_v = self._kept_context(context_k, context_v)
    elif q.shape[1] == 1 and context is None:
      k, v = unchanging(k, v)
    k = adapt(self, self.placements, 'keys', inputs_kv, k)
    v = adapt(self, self.placements, 'values', inputs_kv, v)
    # What adapters put before the keys is seen from everywhere.
    added = k.shape[1] - mask.shape[-1]
    mask = jnp.pad(mask, [(0, 0)] * 3 + [(added, 0)], constant_values=True)
    if context is not None:
      k = jnp.concatenate([k, context_k], axis=1)
      v = jnp.concatenate([v, context_v], axis=1)
      masks = (
        jnp.broadcast_to(m, (q.shape[0], 1, q.shape[1], m.shape[-1]))
        for m in (mask, context[1])
      )
      mask = jnp.concatenate(list(masks), axis=-1)

    dropout = nn.Dropout(cfg.dropout_rate, deterministic=not enable_dropout)
    # As in T5, the weight of a key is dropped for all queries or for none.
    v = v * dropout(jnp.ones((*v.shape[:3], 1), dtype))
    # g: the query heads of one head of keys and values.
    group = stack.num_heads // stack.num_kv_heads
    q = q.reshape(*q.shape[:2], stack.num_kv_heads, group, stack.head_dim)
    logits = cap(product('bkhd,bqhgd->bhgqk', k, q), cfg.attention_cap)
    weights, total = exponentials(dtype, logits, mask[:, :, None])
    # [b, h, g, q] -> [b, q, h, g, 1]
    total = jnp.moveaxis(total, -1, 1)[..., None]
    y = (product('bhgqk,bkhd->bqhgd', weights, v) / total).astype(dtype)
    y = y.reshape(*y.shape[:2], -1)
    out = Dense(inputs_q.shape[-1], ('joined_kv', 'embed'), dtype, name='out')(
      y
    )
    return adapt(self, self.placements, 'out', y, out)

  def _project(self, site: str, x: jax.Array) -> jax.Array:
    """Makes queries, keys or values: [b, t, embed] -> [b, t, heads, kv]."""
    stack, query = self.stack, site == 'query'
    heads = stack.num_heads if query else stack.num_kv_heads
    y = Dense(
      heads * stack.head_dim,
      ('embed', 'joined_kv'),
      jnp.dtype(self.config.dtype),
      name=site,
    )(x)
    y = y.reshape(*y.shape[:-1], heads, stack.head_dim)
    y = constrain(y, 'batch', 'length', 'heads' if query else 'kv_heads', 'kv')
    return adapt(self, self.placements, site, x, y)

  def _turned(
    self, site: str, x: jax.Array, positions: Rotary | None
  ) -> jax.Array:
    """Queries or keys, normed in version 2, and turned as far as positions go.

    What stands behind them, the context, is not turned.
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

  def _kept_context(
    self, k: jax.Array, v: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Those of the call that made the cache."""
    return (
      self.variable('cache', 'context_key', lambda: k).value,
      self.variable('cache', 'context_value', lambda: v).value,
    )


@dataclasses.dataclass(frozen=True)
class _Sublayer:
  """A sublayer between two norms, around which the residual stream goes.

  Attributes:
    layer: The layer, in whose compact call this is made.
    norm: The name of its norms, without `pre_` and `post_`.
    site: The site of what it adds to the stream.
    enable_dropout: Whether that is dropped.
  """

  layer: 'EncoderLayer | DecoderLayer'
  norm: str
  site: str
  enable_dropout: bool

  def __call__(
    self, x: jax.Array, compute: Callable[[jax.Array], jax.Array]
  ) -> jax.Array:
    """[batch, length, embed] -> the same shape."""
    layer, cfg = self.layer, self.layer.config
    dtype = jnp.dtype(cfg.dtype)
    h = LayerNorm(dtype, offset=1.0, name=f'pre_{self.norm}')(x)
    y = LayerNorm(dtype, offset=1.0, name=f'post_{self.norm}')(compute(h))
    y = adapt(layer, layer.placements, self.site, h, y)
    return x + _dropout(cfg, self.enable_dropout)(y)


def _dropout(config: T5GemmaConfig, enable_dropout: bool) -> nn.Dropout:
  return nn.Dropout(
    config.dropout_rate,
    broadcast_dims=(-2,),
    deterministic=not enable_dropout,
  )


def _mlp(layer: 'EncoderLayer | DecoderLayer', stack: Stack, **how: bool):
  cfg = layer.config
  mlp = Mlp(
    stack.mlp_dim,
    ('gelu', 'linear'),
    jnp.dtype(cfg.dtype),
    cfg.dropout_rate,
    layer.placements,
    name='mlp',
  )
  return functools.partial(mlp, **how)


class View(NamedTuple):
  """What the layers of a kind see.

  Attributes:
    mask: Broadcasts to [batch, 1, q, k]; True where a query may look.
    positions: Of the queries and their own keys.
  """

  mask: jax.Array
  positions: Rotary


def _view(full: jax.Array, views: tuple[View, View]) -> View:
  """The first of the views if `full`, or the second."""
  return jax.tree.map(lambda a, b: jnp.where(full, a, b), *views)


def _views(
  config: T5GemmaConfig,
  stack: Stack,
  mask: jax.Array,
  near: jax.Array,
  positions: jax.Array,
) -> tuple[View, View]:
  """What global layers and local ones see.

  Args:
    config: The model.
    stack: Its encoder or decoder.
    mask: Broadcasts to [batch, 1, q, k].
    near: [q, k] True within the window.
    positions: [rows, q] of the queries.
  """
  turned = functools.partial(rotary, positions, stack.head_dim)
  return (
    View(mask, turned(config.theta, config.rope_factor)),
    View(mask & near[None, None], turned(config.local_theta)),
  )


def _full(config: T5GemmaConfig, stack: Stack) -> np.ndarray:
  """Which layers are global: [layers] bool."""
  return np.arange(1, stack.num_layers + 1) % config.window_pattern == 0


class EncoderLayer(nn.Module):
  """Self-attention and MLP. Sites as in `network.EncoderLayer`."""

  config: T5GemmaConfig
  placements: tuple[Placement, ...] = ()

  @nn.compact
  def __call__(self, x, views, full, *, enable_dropout: bool = False):
    """[batch, length, embed] -> the same shape; `full`: is it global?"""
    cfg, place = self.config, self.placements
    mask, positions = _view(full, views)
    sublayer = functools.partial(_Sublayer, self, enable_dropout=enable_dropout)
    x = adapt(self, place, 'input', x, x)
    attention = Attention(cfg, cfg.encoder, place, name='attention')
    x = sublayer('attention_layer_norm', 'attention')(
      x,
      lambda h: attention(h, h, mask, positions, enable_dropout=enable_dropout),
    )
    mlp = _mlp(self, cfg.encoder, enable_dropout=enable_dropout)
    x = sublayer('mlp_layer_norm', 'mlp')(x, mlp)
    return constrain(x, 'batch', 'length', 'embed')


class DecoderLayer(nn.Module):
  """Self-attention, attention to the encoder and MLP.

  In version 2, self-attention attends to the encoder too, and the second
  sublayer is not there. Sites as in `network.DecoderLayer`.
  """

  config: T5GemmaConfig
  placements: tuple[Placement, ...] = ()

  @nn.compact
  def __call__(
    self,
    x,
    encoded,
    encoder_mask,
    views,
    full,
    *,
    cache_index=None,
    prefill: bool = False,
    enable_dropout: bool = False,
  ):
    """[batch, length, embed] -> the same shape; `full`: is it global?"""
    cfg, place = self.config, self.placements
    mask, positions = _view(full, views)
    sublayer = functools.partial(_Sublayer, self, enable_dropout=enable_dropout)
    attention = functools.partial(Attention, cfg, cfg.decoder, place)
    x = adapt(self, place, 'input', x, x)
    own = attention(name='self_attention')
    x = sublayer('self_attention_layer_norm', 'self_attention')(
      x,
      lambda h: own(
        h,
        h,
        mask,
        positions,
        context=(encoded, encoder_mask) if cfg.version == 2 else None,
        cache_index=cache_index,
        prefill=prefill,
        enable_dropout=enable_dropout,
      ),
    )
    if cfg.version == 1:
      cross = attention(name='encoder_decoder_attention')
      x = sublayer('cross_attention_layer_norm', 'encoder_decoder_attention')(
        x,
        lambda h: cross(
          h, encoded, encoder_mask, enable_dropout=enable_dropout
        ),
      )
    mlp = _mlp(self, cfg.decoder, enable_dropout=enable_dropout)
    x = sublayer('mlp_layer_norm', 'mlp')(x, mlp)
    return constrain(x, 'batch', 'length', 'embed')


class Encoder(nn.Module):
  """The encoder. Sites as in `network.Encoder`."""

  config: T5GemmaConfig
  token_embedder: Embed
  placements: tuple[Placement, ...] = ()

  @nn.compact
  def __call__(self, tokens, segment_ids=None, *, enable_dropout=False):
    """[batch, length] -> [batch, length + what adapters add, embed]."""
    cfg, place = self.config, self.placements
    dropout = _dropout(cfg, enable_dropout)
    x = self.token_embedder(tokens)
    real = tokens != cfg.ids.pad
    tokens = jnp.where(real, tokens, PADDING)
    # [batch, length, embed] -> [batch, prompt + length, embed]
    x = adapt(self, place, 'embed', tokens, x)
    x = constrain(x, 'batch', 'length', 'embed')
    if cfg.version == 1:
      x = _times_root(x, cfg.encoder.emb_dim)

    length = x.shape[1]
    mask = grow(real, length)[:, None, None, :]
    if segment_ids is not None:
      refuse_packing(tokens, length)
      mask &= segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    mask = adapt(self, place, 'mask', tokens, mask)
    positions = jnp.arange(length)
    near = near_both_ways(cfg, positions)
    x = scan.through_layers(
      functools.partial(EncoderLayer, cfg, place),
      cfg.encoder.num_layers,
      dropout(x),
      (_views(cfg, cfg.encoder, mask, near, positions[None]),),
      each=(_full(cfg, cfg.encoder),),
      remat=cfg.remat,
      scans=cfg.scan,
      enable_dropout=enable_dropout,
    )
    x = LayerNorm(jnp.dtype(cfg.dtype), offset=1.0, name='encoder_norm')(x)
    return adapt(self, place, 'output', tokens, dropout(x))


def near_both_ways(config: T5GemmaConfig, positions: jax.Array) -> jax.Array:
  """Which keys lie in the window of the encoder: [length] -> [q, k].

  In version 1, those that are up to `window` positions away, on either side.
  In version 2, `window` keys in all, the query's own among them.
  """
  window = config.encoder.window
  before = positions[:, None] - positions[None, :]
  if config.version == 1:
    return jnp.abs(before) <= window
  return (before < (window + 1) // 2) & (-before < window // 2 + 1)


class Decoder(nn.Module):
  """The decoder and the output layer. Sites as in `network.Decoder`."""

  config: T5GemmaConfig
  token_embedder: Embed
  placements: tuple[Placement, ...] = ()

  @nn.compact
  def __call__(
    self,
    tokens,
    encoded,
    encoder_tokens,
    target_tokens,
    encoder_segment_ids=None,
    segment_ids=None,
    *,
    decode=False,
    enable_dropout=False,
  ):
    """[batch, length] -> logits [batch, length, vocab], float32.

    With decode, the first call makes the cache for `length` positions, and
    each later one takes the token of the next position, [batch, 1].
    """
    cfg, place = self.config, self.placements
    stack, dtype = cfg.decoder, jnp.dtype(cfg.dtype)
    dropout = _dropout(cfg, enable_dropout)
    x = adapt(self, place, 'embed', tokens, self.token_embedder(tokens))
    x = constrain(x, 'batch', 'length', 'embed')
    if cfg.version == 1:
      x = _times_root(x, stack.emb_dim)
    added = x.shape[1] - tokens.shape[1]

    real = encoder_tokens != cfg.ids.pad
    encoder_mask = grow(real, encoded.shape[1])[:, None, None, :]
    cache_index = None
    if decode and self.has_variable('cache', 'cache_index'):
      x = x[:, added:]  # What was added lies in the cache.
      cache_index = self.get_variable('cache', 'cache_index')
      keys = self.get_variable('cache', 'position_embedder_index')
      queries = cache_index[None]
      self.put_variable('cache', 'cache_index', cache_index + 1)
    else:
      keys = queries = jnp.arange(x.shape[1])
      if decode:
        cache_index = jnp.zeros((), jnp.int32)
        # T5X's beams share what has this name.
        self.put_variable('cache', 'position_embedder_index', keys)
        self.put_variable('cache', 'cache_index', cache_index + added)
    before = queries[:, None] - keys[None, :]  # [q, k]
    positions = queries[None]
    mask = (before >= 0)[None, None]
    if not decode:
      wanted = target_tokens != cfg.ids.pad
      mask = mask & grow(wanted, x.shape[1])[:, None, None, :]
    if segment_ids is not None:
      refuse_packing(encoder_tokens, encoded.shape[1])
      refuse_packing(tokens, x.shape[1])
      asked = segment_ids[:, None, :, None]
      own = asked == segment_ids[:, None, None, :]
      mask = mask & own
      # From the start of the example, since queries that are turned meet keys
      # of the encoder that are not.
      positions = positions - jnp.argmax(own[:, 0], axis=-1)
      encoder_mask &= asked == encoder_segment_ids[:, None, None, :]
    mask = adapt(self, place, 'mask', tokens, mask)
    encoder_mask = adapt(
      self,
      place,
      'encoder_mask',
      jnp.where(real, encoder_tokens, PADDING),
      encoder_mask,
    )
    x = scan.through_layers(
      functools.partial(DecoderLayer, cfg, place),
      stack.num_layers,
      dropout(x),
      (
        encoded,
        encoder_mask,
        _views(cfg, stack, mask, before < stack.window, positions),
      ),
      each=(_full(cfg, stack),),
      remat=cfg.remat and not decode,
      scans=cfg.scan,
      cache_index=cache_index,
      prefill=added > 0,
      enable_dropout=enable_dropout,
    )
    x = x[:, -tokens.shape[1] :]
    x = dropout(LayerNorm(dtype, offset=1.0, name='decoder_norm')(x))
    x = adapt(self, place, 'output', tokens, x)
    if cfg.logits_via_embedding:
      logits = self.token_embedder.attend(x)
    else:
      logits = Dense(
        cfg.vocab_size,
        ('embed', 'vocab'),
        dtype,
        out_dtype=jnp.float32,
        name='logits_dense',
      )(x)
    logits = cap(logits, cfg.logits_cap)
    return constrain(logits, 'batch', 'length', 'vocab')
