"""An encoder-decoder: encoder, decoder, and both together.

Two families have their own layers: T5 (`t5`) and T5Gemma (`t5gemma`); all else
is the same. The parameter names are those of T5X checkpoints, and the calls
take what T5X passes, so that either program can host the module. The network
knows no tuning method: it names its sites (`structure.sites` lists them) and
calls `adapters.adapt` at each.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from ptune.model import cache, decoder_alone, head, t5, t5gemma
from ptune.model.adapters import PADDING, Placement, adapt
from ptune.model.layers import (
  Embed,
  LayerNorm,
  constrain,
  fill_tiles,
  pad_to,
  residual_dropout,
  times_root,
)
from ptune.model.masks import grow, refuse_packing, same_example
from ptune.model.sizes import Config
from ptune.model.t5gemma_sizes import T5GemmaConfig


class Encoder(nn.Module):
  """The encoder.

  Sites: `embed` (tokens [batch, length] in, embeddings out), `mask` (which
  positions a query may attend to: bool, broadcasts to [batch, heads, q, k]),
  `output`. The tokens that adapters see at these sites have PADDING at padding.

  Attributes:
    config: Its sizes.
    layers: Computes the layers, such as `t5.encoder_layers`.
    token_embedder: Embeds its tokens.
    placements: The adapters.
  """

  config: Config
  layers: Callable
  token_embedder: Embed
  placements: tuple[Placement, ...] = ()

  @nn.compact
  def __call__(self, tokens, segment_ids=None, *, enable_dropout=False):
    """[batch, length] -> [batch, length + what adapters add, embed]."""
    cfg, place = self.config, self.placements
    dropout = residual_dropout(cfg, enable_dropout)
    x = self.token_embedder(tokens)
    real = tokens != cfg.ids.pad
    tokens = jnp.where(real, tokens, PADDING)
    # [batch, length, embed] -> [batch, prompt + length, embed]
    x = adapt(self, place, 'embed', tokens, x)
    x = constrain(x, 'batch', 'length', 'embed')
    if cfg.scales_inputs:
      x = times_root(x)

    length = x.shape[1]
    mask = grow(real, length)[:, None, None, :]
    if segment_ids is not None:
      refuse_packing(tokens, length)
      mask &= same_example(segment_ids, segment_ids)
    mask = adapt(self, place, 'mask', tokens, mask)
    # From here to the norm, positions fill whole tiles of the device.
    filled = fill_tiles(length, cfg.length_multiple)
    x = pad_to(x, 1, filled)
    mask = pad_to(mask, 3, filled)
    if mask.shape[2] > 1:
      mask = pad_to(mask, 2, filled)

    x = self.layers(
      self,
      cfg,
      place,
      dropout(x),  # The prompt is dropped like any other position.
      mask,
      enable_dropout=enable_dropout,
    )
    norm = LayerNorm(
      jnp.dtype(cfg.dtype), offset=cfg.norm_offset, name='encoder_norm'
    )
    # Its gradient is a sum over the decoder's layers, and made once: otherwise,
    # XLA adds them up in each pass over it that the norm's gradient takes.
    x = jax.lax.optimization_barrier(dropout(norm(x)))[:, :length]
    return adapt(self, place, 'output', tokens, x)


class Decoder(nn.Module):
  """The decoder and the output layer.

  Sites: `embed`, `mask` and `output` as in the encoder, and `encoder_mask`
  (which encoded positions a query may attend to).

  Attributes:
    config: Its sizes.
    layers: Computes the layers, such as `t5.decoder_layers`.
    token_embedder: Embeds its tokens.
    output_embedder: Makes the logits, if config.logits_via_embedding.
    placements: The adapters.
  """

  config: Config
  layers: Callable
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

    With decode, the first call makes the cache for `length` positions. Each
    later call takes the token of the next position, [batch, 1].
    """
    cfg, place = self.config, self.placements
    dropout = residual_dropout(cfg, enable_dropout)
    x = adapt(self, place, 'embed', tokens, self.token_embedder(tokens))
    x = constrain(x, 'batch', 'length', 'embed')
    if cfg.scales_inputs:
      x = times_root(x)
    added = x.shape[1] - tokens.shape[1]
    positions = cache.positions(self, x.shape[1], added, decode)
    if positions.in_step:
      x = x[:, added:]  # The cache holds what adapters added.

    # [1, 1, q, k] & [batch, 1, 1, k]
    mask = positions.queries[:, None] >= positions.keys[None, :]
    mask = mask[None, None]
    if not decode:
      wanted = target_tokens != cfg.ids.pad
      mask &= grow(wanted, x.shape[1])[:, None, None, :]
    real = encoder_tokens != cfg.ids.pad
    encoder_mask = grow(real, encoded.shape[1])[:, None, None, :]
    if segment_ids is not None:
      refuse_packing(encoder_tokens, encoded.shape[1])
      refuse_packing(tokens, x.shape[1])
      mask &= same_example(segment_ids, segment_ids)
      encoder_mask &= same_example(segment_ids, encoder_segment_ids)
    mask = adapt(self, place, 'mask', tokens, mask)
    encoder_tokens = jnp.where(real, encoder_tokens, PADDING)
    encoder_mask = adapt(
      self, place, 'encoder_mask', encoder_tokens, encoder_mask
    )
    filled = fill_tiles(encoded.shape[1], cfg.length_multiple)

    x = self.layers(
      self,
      cfg,
      place,
      dropout(x),
      pad_to(encoded, 1, filled),
      mask,
      pad_to(encoder_mask, 3, filled),
      positions,
      segment_ids,
      prefill=added > 0,
      enable_dropout=enable_dropout,
    )
    x = x[:, -tokens.shape[1] :]
    return head.logits(
      self, cfg, place, self.output_embedder, tokens, x, dropout
    )


class Transformer(nn.Module):
  """An encoder-decoder, or a decoder alone, with what its placements add.

  Attributes:
    config: Its sizes; their type names the family.
    placements: The adapters of the tuning method, see `adapters`.
  """

  config: Config
  placements: tuple[Placement, ...] = ()

  def setup(self):
    cfg, place = self.config, self.placements
    if isinstance(cfg, T5GemmaConfig):
      self.token_embedder = read = t5gemma.embedder(cfg, cfg.encoder)
      if cfg.decoder_embedding:
        self.decoder_token_embedder = read = t5gemma.embedder(cfg, cfg.decoder)
      family, output = t5gemma, read
    else:
      self.token_embedder = read = output = t5.embedder(cfg)
      if cfg.decoder_embedding:
        self.decoder_token_embedder = read = t5.embedder(cfg)
      family = t5
      if cfg.decoder_only:
        self.encoder = decoder_alone.Prefix(cfg, self.token_embedder, place)
        self.decoder = decoder_alone.Decoder(cfg, read, output, place)
        return
    self.encoder = Encoder(
      cfg, family.encoder_layers, self.token_embedder, place
    )
    self.decoder = Decoder(cfg, family.decoder_layers, read, output, place)

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
    """Runs the decoder on the output of the encoder.

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
