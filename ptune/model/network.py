"""T5 in Flax Linen: encoder, decoder, decoding cache.

The parameter names are those of T5X checkpoints and the calls take what T5X
passes, so that the module can be hosted by either program. The network knows
no tuning method: it names its sites (`sites` lists them) and hands them to
`adapters.adapt`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax import lax

from ptune.errors import UserError
from ptune.model import long_attention, scan, t5gemma
from ptune.model.adapters import PADDING, Placement, adapt, matches
from ptune.model.attention import Attention, RelativePositionBias
from ptune.model.decoder_alone import Prefix, padded_in_front
from ptune.model.layers import (
  Dense,
  Embed,
  LayerNorm,
  Mlp,
  constrain,
  fill_tiles,
  grow,
  pad_to,
  refuse_packing,
)
from ptune.model.sizes import Config, T5Config
from ptune.model.t5gemma_sizes import T5GemmaConfig


def _relative_bias(cfg: T5Config, bidirectional: bool) -> RelativePositionBias:
  """The position bias of a stack, or of a layer."""
  return RelativePositionBias(
    cfg.num_heads,
    bidirectional,
    cfg.relative_attention_num_buckets,
    cfg.relative_attention_max_distance,
    name='relpos_bias',
  )


def _cached_bias(
  module: nn.Module,
  bias_of: RelativePositionBias,
  length: int,
  cache_index: jax.Array | None,
) -> jax.Array:
  """A decoder's position bias, [1, heads, q, k].

  Args:
    module: Keeps it in the cache while it decodes.
    bias_of: Makes it.
    length: Positions that the bias is for, where none is kept yet.
    cache_index: When decoding, the position of the one query.
  """
  if cache_index is not None and module.has_variable('cache', 'cached_bias'):
    bias = module.get_variable('cache', 'cached_bias')
    # [1, heads, length, length] -> [1, heads, 1, length]
    return lax.dynamic_slice_in_dim(bias, cache_index, 1, axis=2)
  bias = bias_of(length)
  if cache_index is not None:
    module.put_variable('cache', 'cached_bias', bias)
  return bias


class EncoderLayer(nn.Module):
  """Self-attention and MLP, each behind a norm and around a residual.

  Sites: `input` (the residual stream), `attention`, `mlp` (what the sublayer
  adds to it), and those within.
  """

  config: T5Config
  placements: tuple[Placement, ...] = ()

  @nn.compact
  def __call__(self, x, mask, bias, *, enable_dropout: bool = False):
    """[batch, length, embed] -> the same shape."""
    cfg, place = self.config, self.placements
    dtype = jnp.dtype(cfg.dtype)
    dropout = nn.Dropout(
      cfg.dropout_rate,
      broadcast_dims=(-2,),
      deterministic=not enable_dropout,
    )
    if cfg.relative_attention_per_layer:
      bias = _relative_bias(cfg, True)(x.shape[1])
    x = adapt(self, place, 'input', x, x)

    h = LayerNorm(dtype, name='pre_attention_layer_norm')(x)
    attention = Attention
    if cfg.local_radius:
      attention = functools.partial(
        long_attention.LongAttention, radius=cfg.local_radius
      )
    y = attention(
      cfg.num_heads,
      cfg.head_dim,
      dtype,
      cfg.dropout_rate,
      place,
      cfg.fused_attention,
      name='attention',
    )(h, h, mask, bias, enable_dropout=enable_dropout)
    x = x + dropout(adapt(self, place, 'attention', h, y))

    h = LayerNorm(dtype, name='pre_mlp_layer_norm')(x)
    y = Mlp(
      cfg.mlp_dim,
      cfg.mlp_activations,
      dtype,
      cfg.dropout_rate,
      place,
      name='mlp',
    )(h, enable_dropout=enable_dropout)
    x = x + dropout(adapt(self, place, 'mlp', h, y))
    return constrain(x, 'batch', 'length', 'embed')


class DecoderLayer(nn.Module):
  """Self-attention, attention to the encoder where there is one, and MLP.

  Sites: `input`, `self_attention`, `encoder_decoder_attention`, `mlp`, and
  those within.
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
    dtype = jnp.dtype(cfg.dtype)
    dropout = nn.Dropout(
      cfg.dropout_rate,
      broadcast_dims=(-2,),
      deterministic=not enable_dropout,
    )

    def attention(name, *inputs, **kwargs):
      return Attention(
        cfg.num_heads,
        cfg.head_dim,
        dtype,
        cfg.dropout_rate,
        place,
        cfg.fused_attention,
        name=name,
      )(*inputs, enable_dropout=enable_dropout, **kwargs)

    if cfg.relative_attention_per_layer:
      made = _relative_bias(cfg, False)
      bias = _cached_bias(self, made, x.shape[1], cache_index)
    x = adapt(self, place, 'input', x, x)

    h = LayerNorm(dtype, name='pre_self_attention_layer_norm')(x)
    y = attention(
      'self_attention',
      h,
      h,
      mask,
      bias,
      cache_index=cache_index,
      prefill=prefill,
    )
    x = x + dropout(adapt(self, place, 'self_attention', h, y))

    if encoded is not None:
      h = LayerNorm(dtype, name='pre_cross_attention_layer_norm')(x)
      y = attention('encoder_decoder_attention', h, encoded, encoder_mask)
      x = x + dropout(adapt(self, place, 'encoder_decoder_attention', h, y))

    h = LayerNorm(dtype, name='pre_mlp_layer_norm')(x)
    y = Mlp(
      cfg.mlp_dim,
      cfg.mlp_activations,
      dtype,
      cfg.dropout_rate,
      place,
      name='mlp',
    )(h, enable_dropout=enable_dropout)
    x = x + dropout(adapt(self, place, 'mlp', h, y))
    return constrain(x, 'batch', 'length', 'embed')


class Encoder(nn.Module):
  """The encoder.

  Sites: `embed` (tokens [batch, length] in, embeddings out), `mask` (which
  positions each one sees: bool, broadcasts to [batch, heads, q, k]), `output`.
  The tokens that they read have PADDING at padding.
  """

  config: T5Config
  token_embedder: Embed
  placements: tuple[Placement, ...] = ()

  @nn.compact
  def __call__(self, tokens, segment_ids=None, *, enable_dropout=False):
    """[batch, length] -> [batch, length + what adapters add, embed]."""
    cfg = self.config
    x = self.token_embedder(tokens)
    real = tokens != cfg.ids.pad
    tokens = jnp.where(real, tokens, PADDING)
    # [batch, length, embed] -> [batch, prompt + length, embed]
    x = adapt(self, self.placements, 'embed', tokens, x)
    x = constrain(x, 'batch', 'length', 'embed')

    length = x.shape[1]
    mask = grow(real, length)[:, None, None, :]
    if segment_ids is not None:
      refuse_packing(tokens, length)
      mask &= segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    mask = adapt(self, self.placements, 'mask', tokens, mask)
    # From here to the norm, positions fill whole tiles of the device.
    filled = fill_tiles(length, cfg.length_multiple)
    x = pad_to(x, 1, filled)
    mask = pad_to(mask, 3, filled)
    if mask.shape[2] > 1:
      mask = pad_to(mask, 2, filled)
    bias = None
    if cfg.local_radius:
      bias = long_attention.bias(cfg, mask)
    elif not cfg.relative_attention_per_layer:
      bias = _relative_bias(cfg, True)(filled)

    dropout = nn.Dropout(
      cfg.dropout_rate,
      broadcast_dims=(-2,),
      deterministic=not enable_dropout,
    )
    x = dropout(x)  # The prompt is dropped like any other position.
    x = scan.through_layers(
      functools.partial(EncoderLayer, cfg, self.placements),
      cfg.num_encoder_layers,
      x,
      (mask, bias),
      remat=cfg.remat,
      scans=cfg.scan,
      enable_dropout=enable_dropout,
    )
    x = LayerNorm(jnp.dtype(cfg.dtype), name='encoder_norm')(x)
    x = dropout(x)[:, :length]
    return adapt(self, self.placements, 'output', tokens, x)


class Decoder(nn.Module):
  """The decoder and the output layer.

  A decoder alone (no encoder layers) is a prefix LM: what `Prefix` returns
  stands before the targets, and all of it is seen from each of its positions.

      reads  . . a b </s> x y
      says           x    y </s>   (the last input predicts the first target)

  Sites: `embed`, `mask` and `output` as in the encoder, `encoder_mask` (which
  encoded positions are seen).

  Attributes:
    config: Its sizes.
    token_embedder: Embeds its tokens.
    output_embedder: Makes the logits, where an embedding does.
    placements: The adapters.
  """

  config: T5Config
  token_embedder: Embed
  output_embedder: Embed
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
    dtype = jnp.dtype(cfg.dtype)
    x = self.token_embedder(tokens)
    x = token = adapt(self, place, 'embed', tokens, x)
    if cfg.decoder_only:
      if x.shape[1] != tokens.shape[1]:
        raise UserError(
          'a decoder alone has no place for a prompt before the targets; put'
          ' it before the inputs, by methods/prompt.gin'
        )
      x = jnp.concatenate([encoded, x[:, 1:]], axis=1)
    x = constrain(x, 'batch', 'length', 'embed')
    added = x.shape[1] - tokens.shape[1]

    real = encoder_tokens != cfg.ids.pad
    encoder_mask = grow(real, encoded.shape[1])[:, None, None, :]
    cache_index = None
    # The cache leaf that tells for how many positions there is room.
    room = 'cached_bias'
    if cfg.relative_attention_per_layer:
      room = 'position_embedder_index'
    if decode and self.has_variable('cache', 'cache_index'):
      x = x[:, added:]  # What was added lies in the cache.
      cache_index = self.get_variable('cache', 'cache_index')
      length = self.get_variable('cache', room).shape[-1]
      mask = (jnp.arange(length) <= cache_index)[None, None, None, :]
      if cfg.decoder_only:  # The first step asks at the last input.
        x = jnp.where(cache_index == added, x, token)
      self.put_variable('cache', 'cache_index', cache_index + 1)
    else:
      length = x.shape[1]
      positions = jnp.arange(length)
      # [1, 1, q, k] & [batch, 1, 1, k]
      mask = (positions[:, None] >= positions[None, :])[None, None]
      if cfg.decoder_only:
        mask |= (positions <= added)[None, None, None, :]
      if decode:
        cache_index = jnp.zeros((), jnp.int32)
        self.put_variable('cache', 'cache_index', cache_index + added)
        if cfg.relative_attention_per_layer:
          self.put_variable('cache', room, positions)
      else:
        wanted = target_tokens != cfg.ids.pad
        mask = mask & grow(wanted, length)[:, None, None, :]
    bias = None
    if not cfg.relative_attention_per_layer:
      made = _relative_bias(cfg, False)
      bias = _cached_bias(self, made, length, cache_index)
    if segment_ids is not None:
      refuse_packing(encoder_tokens, encoded.shape[1])
      refuse_packing(tokens, length)
      queries = segment_ids[:, None, :, None]
      mask = mask & (queries == segment_ids[:, None, None, :])
      encoder_mask &= queries == encoder_segment_ids[:, None, None, :]
    mask = adapt(self, place, 'mask', tokens, mask)
    encoder_tokens = jnp.where(real, encoder_tokens, PADDING)
    encoder_mask = adapt(
      self, place, 'encoder_mask', encoder_tokens, encoder_mask
    )
    if cfg.decoder_only:
      seen = padded_in_front(encoder_mask[:, 0, 0], real)
      # The positions of targets, which come behind, are in the mask already.
      after = ((0, 0), (0, mask.shape[-1] - seen.shape[1]))
      mask &= jnp.pad(seen, after, constant_values=True)[:, None, None, :]
      encoded = encoder_mask = None
    else:
      filled = fill_tiles(encoded.shape[1], cfg.length_multiple)
      encoded = pad_to(encoded, 1, filled)
      encoder_mask = pad_to(encoder_mask, 3, filled)

    dropout = nn.Dropout(
      cfg.dropout_rate,
      broadcast_dims=(-2,),
      deterministic=not enable_dropout,
    )
    x = dropout(x)
    x = scan.through_layers(
      functools.partial(DecoderLayer, cfg, self.placements),
      cfg.num_decoder_layers,
      x,
      (encoded, mask, encoder_mask, bias),
      remat=cfg.remat and not decode,
      scans=cfg.scan,
      cache_index=cache_index,
      prefill=added > 0,
      enable_dropout=enable_dropout,
    )
    x = x[:, -tokens.shape[1] :]
    x = dropout(LayerNorm(dtype, name='decoder_norm')(x))
    x = adapt(self, place, 'output', tokens, x)
    if cfg.scales_outputs:
      x = x * cfg.emb_dim**-0.5
    if cfg.logits_via_embedding:
      logits = self.output_embedder.attend(x)
    else:
      logits = Dense(
        cfg.vocab_size,
        ('embed', 'vocab'),
        dtype,
        out_dtype=jnp.float32,
        name='logits_dense',
      )(x)
    return constrain(logits, 'batch', 'length', 'vocab')


class Transformer(nn.Module):
  """An encoder-decoder T5, or a decoder alone, with what its placements add.

  Attributes:
    config: Its sizes, which name its family: a T5, or a T5Gemma (see
      `t5gemma`).
    placements: The adapters of the tuning method, see `adapters`.
  """

  config: Config
  placements: tuple[Placement, ...] = ()

  def setup(self):
    cfg = self.config
    if isinstance(cfg, T5GemmaConfig):
      self.token_embedder = read = t5gemma.embedder(cfg, cfg.encoder)
      if cfg.decoder_embedding:
        self.decoder_token_embedder = read = t5gemma.embedder(cfg, cfg.decoder)
      self.encoder = t5gemma.Encoder(cfg, self.token_embedder, self.placements)
      self.decoder = t5gemma.Decoder(cfg, read, self.placements)
      return
    embed = functools.partial(
      Embed, cfg.vocab_size, cfg.emb_dim, jnp.dtype(cfg.dtype)
    )
    self.token_embedder = read = embed()
    if cfg.decoder_embedding:
      self.decoder_token_embedder = read = embed()
    encoder = Prefix if cfg.decoder_only else Encoder
    self.encoder = encoder(cfg, self.token_embedder, self.placements)
    self.decoder = Decoder(cfg, read, self.token_embedder, self.placements)

  def encode(
    self, encoder_input_tokens, encoder_segment_ids=None, enable_dropout=True
  ):
    """Runs the encoder.

    Args:
      encoder_input_tokens: [batch, length] int32, padded with config.ids.pad.
      encoder_segment_ids: [batch, length] which packed example a token is of.
      enable_dropout: Whether to drop; needs a `dropout` rng.

    Returns:
      [batch, length + what adapters add, embed].
    """
    return self.encoder(
      encoder_input_tokens,
      encoder_segment_ids,
      enable_dropout=enable_dropout,
    )

  def decode(
    self,
    encoded,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
    encoder_segment_ids=None,
    decoder_segment_ids=None,
    decoder_positions=None,
    *,
    enable_dropout=True,
    decode=False,
    max_decode_length=None,
  ):
    """Runs the decoder on what the encoder returned.

    Args:
      encoded: [batch, encoded length, embed].
      encoder_input_tokens: [batch, length] as given to the encoder; tells
        which encoded positions are padding.
      decoder_input_tokens: [batch, target length], or [batch, 1] in a step of
        cached decoding.
      decoder_target_tokens: Like decoder_input_tokens, padded with
        config.ids.pad.
      encoder_segment_ids: [batch, length], with packed examples.
      decoder_segment_ids: [batch, target length], with packed examples.
      decoder_positions: Unused; distances follow from the order.
      enable_dropout: Whether to drop; needs a `dropout` rng.
      decode: Cached decoding, see `Decoder`.
      max_decode_length: Unused; the cache has the length it was made with.

    Returns:
      Logits [batch, target length, vocab], float32.
    """
    del decoder_positions, max_decode_length
    return self.decoder(
      decoder_input_tokens,
      encoded,
      encoder_input_tokens,
      decoder_target_tokens,
      encoder_segment_ids,
      decoder_segment_ids,
      decode=decode,
      enable_dropout=enable_dropout,
    )

  def __call__(
    self,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
    encoder_segment_ids=None,
    decoder_segment_ids=None,
    encoder_positions=None,
    decoder_positions=None,
    *,
    enable_dropout=True,
    decode=False,
  ):
    """Logits [batch, target length, vocab]; arguments as in the two parts."""
    del encoder_positions
    encoded = self.encode(
      encoder_input_tokens, encoder_segment_ids, enable_dropout
    )
    return self.decode(
      encoded,
      encoder_input_tokens,
      decoder_input_tokens,
      decoder_target_tokens,
      encoder_segment_ids,
      decoder_segment_ids,
      decoder_positions,
      enable_dropout=enable_dropout,
      decode=decode,
    )


def unrolled(network: Transformer) -> Transformer:
  """The same network, with each layer by itself: the one with T5X's names."""
  return network.clone(config=dataclasses.replace(network.config, scan=False))


@functools.lru_cache(maxsize=8)  # Tracing takes a CPU second and more.
def _abstract(network: Transformer) -> Mapping[str, Any]:
  """Shapes of all variables that one call makes; computes nothing."""
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  init = functools.partial(
    unrolled(network).init, mutable=True, enable_dropout=False
  )
  return jax.eval_shape(init, jax.random.key(0), tokens, tokens, tokens)


def parameters(network: Transformer) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and type of every parameter, by path.

  Raises:
    ValueError: If a placement matches no site of the network, or not all layers
      of one that scans them.
  """
  known = sites(network)
  if network.config.whole != network.config:
    # A method for encoder and decoder stands where it can.
    known += sites(Transformer(network.config.whole))
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
      f'SCAN computes all layers by the same program, and adapters stand in'
      f' some of them only: {single}. Place them in {scan.LAYERS!r}, or set'
      ' SCAN = False'
    )
  return traverse_util.flatten_dict(_abstract(network)['params'], sep='/')


def parameter_axes(network: Transformer) -> dict[str, tuple[str, ...]]:
  """Logical axis names of every parameter, by path."""
  axes = _abstract(network)['params_axes']
  flat = traverse_util.flatten_dict(axes, sep='/')
  return {k.removesuffix('_axes'): tuple(v.names) for k, v in flat.items()}


def sites(network: Transformer) -> list[str]:
  """Every place where an adapter can stand, as a path."""
  sown = _abstract(network)['intermediates']
  flat = traverse_util.flatten_dict(sown, sep='/')
  return sorted(path.removesuffix('_site') for path in flat)


def read_sites(
  config: T5Config, params: Mapping[str, Any], tokens: jax.Array
) -> dict[str, jax.Array]:
  """What leaves each site of a model without adapters, in float32.

  Args:
    config: Its sizes.
    params: Its parameters, by path.
    tokens: [batch, length] what the encoder reads; the decoder reads its start.

  Returns:
    The arrays, by the path of the site.
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
