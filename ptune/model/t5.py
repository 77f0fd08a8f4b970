"""The encoder and decoder layers of T5.

Each layer is a chain of sublayers: norm, attention or MLP, residual
connection. Parameters have the names of T5X checkpoints. T5's only positions
are a learned relative bias, which the layers of a stack share. In UMT5, each
layer has its own.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from ptune.model import cache, long_attention, scan
from ptune.model.adapters import Placement, adapt
from ptune.model.attention import Attention, relative_bias
from ptune.model.layers import (
  Embed,
  Mlp,
  constrain,
  residual_dropout,
  sublayer,
)
from ptune.model.long_attention import LongAttention
from ptune.model.sizes import T5Config


def embedder(config: T5Config) -> Embed:
  """The token embedding."""
  return Embed(config.vocab_size, config.emb_dim, jnp.dtype(config.dtype))


def encoder_layers(
  encoder: nn.Module,
  config: T5Config,
  placements: tuple[Placement, ...],
  x: jax.Array,
  mask: jax.Array,
  *,
  enable_dropout: bool,
) -> jax.Array:
  """All layers of the encoder.

  Call it in a compact method of `encoder`, which owns the parameters.

  Args:
    encoder: The encoder.
    config: Its sizes.
    placements: All placements of the network.
    x: [batch, length, embed].
    mask: Broadcasts to [batch, heads, q, k]; True where a query may attend.
    enable_dropout: Whether to drop.

  Returns:
    [batch, length, embed].
  """
  del encoder  # Flax finds it by itself.
  bias = None
  if config.local_radius:
    bias = long_attention.bias(config, mask)
  elif not config.relative_attention_per_layer:
    bias = relative_bias(config, bidirectional=True)(x.shape[1])
  return scan.through_layers(
    functools.partial(EncoderLayer, config, placements),
    config.num_encoder_layers,
    x,
    (mask, bias),
    remat=config.remat,
    scans=config.scan,
    enable_dropout=enable_dropout,
  )


def decoder_layers(
  decoder: nn.Module,
  config: T5Config,
  placements: tuple[Placement, ...],
  x: jax.Array,
  encoded: jax.Array | None,
  mask: jax.Array,
  encoder_mask: jax.Array | None,
  positions: cache.Positions,
  segment_ids: jax.Array | None = None,
  *,
  prefill: bool,
  enable_dropout: bool,
) -> jax.Array:
  """All layers of the decoder.

  Call it in a compact method of `decoder`, which owns parameters and cache.

  Args:
    decoder: The decoder.
    config: Its sizes.
    placements: All placements of the network.
    x: [batch, q, embed].
    encoded: [batch, encoded length, embed]; None in a decoder alone.
    mask: Broadcasts to [batch, heads, q, k]; True where a query may attend.
    encoder_mask: The same for the encoded positions.
    positions: The positions of this call.
    segment_ids: Unused: a bias needs the distance of two positions alone.
    prefill: Whether the call that makes the cache fills it, see `Attention`.
    enable_dropout: Whether to drop.

  Returns:
    [batch, q, embed].
  """
  del segment_ids
  bias = None
  if config.relative_attention_per_layer:
    cache.keep_length(decoder, positions)
  else:
    compute = relative_bias(config, bidirectional=False)
    length = positions.keys.shape[0]
    bias = cache.bias(decoder, compute, length, positions.cache_index)
  return scan.through_layers(
    functools.partial(DecoderLayer, config, placements),
    config.num_decoder_layers,
    x,
    (encoded, mask, encoder_mask, bias),
    remat=config.remat and positions.cache_index is None,
    scans=config.scan,
    cache_index=positions.cache_index,
    prefill=prefill,
    enable_dropout=enable_dropout,
  )


class EncoderLayer(nn.Module):
  """Self-attention and MLP.

  Sites: `input` (the residual stream), `attention`, `mlp` (the outputs that are
  added to the stream), and those within the sublayers.
  """

  config: T5Config
  placements: tuple[Placement, ...] = ()

  @nn.compact
  def __call__(self, x, mask, bias, *, enable_dropout: bool = False):
    """[batch, length, embed] -> the same shape."""
    cfg, place = self.config, self.placements
    drop = residual_dropout(cfg, enable_dropout)
    if cfg.relative_attention_per_layer:
      bias = relative_bias(cfg, bidirectional=True)(x.shape[1])
    add = functools.partial(sublayer, self, cfg, place, dropout=drop)

    x = adapt(self, place, 'input', x, x)
    kind = Attention
    if cfg.local_radius:
      kind = functools.partial(LongAttention, radius=cfg.local_radius)
    module = _attention(cfg, place, 'attention', kind)

    def attention(h, **around):
      return module(h, h, mask, bias, enable_dropout=enable_dropout, **around)

    fuses = not cfg.local_radius and module.fuses(x, mask, bias)
    x = add('attention', attention, x, fuses=fuses)
    x = mlp_sublayer(self, cfg, place, x, drop)
    return constrain(x, 'batch', 'length', 'embed')


class DecoderLayer(nn.Module):
  """Self-attention, attention to the encoder if there is one, and MLP.

  Sites: `input`, `self_attention`, `encoder_decoder_attention`, `mlp`, and
  those within the sublayers.
  """

  config: T5Config
  placements: tuple[Placement, ...] = ()

  @nn.compact
  def __call__(
    self,
    x,
    encoded,
    mask,
    encoder_mask,
    bias,
    *,
    cache_index=None,
    prefill: bool = False,
    enable_dropout: bool = False,
  ):
    """[batch, length, embed] -> the same shape."""
    cfg, place = self.config, self.placements
    drop = residual_dropout(cfg, enable_dropout)
    if cfg.relative_attention_per_layer:
      compute = relative_bias(cfg, bidirectional=False)
      bias = cache.bias(self, compute, x.shape[1], cache_index)
    add = functools.partial(sublayer, self, cfg, place, dropout=drop)

    def self_attention(h):
      return _attention(cfg, place, 'self_attention')(
        h,
        h,
        mask,
        bias,
        cache_index=cache_index,
        prefill=prefill,
        enable_dropout=enable_dropout,
      )

    def cross_attention(h):
      module = _attention(cfg, place, 'encoder_decoder_attention')
      return module(h, encoded, encoder_mask, enable_dropout=enable_dropout)

    x = adapt(self, place, 'input', x, x)
    x = add('self_attention', self_attention, x)
    if encoded is not None:
      x = add(
        'encoder_decoder_attention', cross_attention, x, norm='cross_attention'
      )
    x = mlp_sublayer(self, cfg, place, x, drop)
    return constrain(x, 'batch', 'length', 'embed')


def _attention(
  cfg: T5Config,
  placements: tuple[Placement, ...],
  name: str,
  kind: Callable[..., Attention] = Attention,
) -> Attention:
  return kind(
    cfg.num_heads,
    cfg.head_dim,
    jnp.dtype(cfg.dtype),
    cfg.dropout_rate,
    placements,
    cfg.fused_attention,
    name=name,
  )


def mlp_sublayer(
  layer: nn.Module,
  config: T5Config,
  placements: tuple[Placement, ...],
  x: jax.Array,
  dropout: nn.Dropout,
) -> jax.Array:
  """The MLP of a layer, as `sublayer`; one kernel computes it if it fits."""
  mlp = Mlp(
    config.mlp_dim,
    config.mlp_activations,
    jnp.dtype(config.dtype),
    config.dropout_rate,
    placements,
    config.fused_mlp,
    name='mlp',
  )
  compute = functools.partial(mlp, enable_dropout=not dropout.deterministic)
  fuses = mlp.fuses(x)
  return sublayer(
    layer, config, placements, 'mlp', compute, x, dropout, fuses=fuses
  )
