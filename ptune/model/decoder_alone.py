"""A decoder alone, used as a prefix LM: it reads the inputs itself.

The inputs come before the targets, and every position sees all of them. The
last input predicts the first target:

    reads     . . [prompt] a b </s> x y
    predicts                   x    y </s>

The decoder continues what it reads, so padding moves to the front. `Prefix`
replaces the encoder and only embeds the inputs.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ptune.errors import UserError
from ptune.model import cache, head, t5
from ptune.model.adapters import PADDING, Placement, adapt
from ptune.model.layers import Embed, constrain, residual_dropout
from ptune.model.masks import grow
from ptune.model.sizes import T5Config


class Prefix(nn.Module):
  """The embedded inputs, padded in front:

      a b </s> . .  ->  . . [prompt] a b </s>

  Sites: `embed` and `mask`, as in the encoder. The decoder makes the mask, at
  its site `encoder_mask`.
  """

  config: T5Config
  token_embedder: Embed
  placements: tuple[Placement, ...] = ()

  @nn.compact
  def __call__(self, tokens, segment_ids=None, *, enable_dropout=False):
    """[batch, length] -> [batch, length + what adapters add, embed]."""
    del enable_dropout  # The decoder drops.
    if segment_ids is not None:
      raise UserError(
        'a decoder alone cannot read packed examples; turn packing off (PACK)'
      )
    x = self.token_embedder(tokens)
    real = tokens != self.config.ids.pad
    tokens = jnp.where(real, tokens, PADDING)
    x = adapt(self, self.placements, 'embed', tokens, x)
    adapt(self, self.placements, 'mask', tokens, real[:, None, None])
    return constrain(padded_in_front(x, real), 'batch', 'length', 'embed')


class Decoder(nn.Module):
  """The decoder and the output layer.

  Sites and attributes are those of `network.Decoder`.
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
    """As `network.Decoder`; `encoded` is what `Prefix` returns."""
    del encoder_segment_ids, segment_ids  # `Prefix` refuses them.
    cfg, place = self.config, self.placements
    drop = residual_dropout(cfg, enable_dropout)
    targets = adapt(self, place, 'embed', tokens, self.token_embedder(tokens))
    if targets.shape[1] != tokens.shape[1]:
      raise UserError(
        'a decoder alone has no place for a prompt before the targets; put the'
        ' prompt before the inputs instead, with methods/prompt.gin'
      )
    # The last input replaces the start token.
    x = jnp.concatenate([encoded, targets[:, 1:]], axis=1)
    x = constrain(x, 'batch', 'length', 'embed')
    added = encoded.shape[1] - 1
    positions = cache.positions(self, x.shape[1], added, decode)
    if positions.in_step:  # The first step reads the last input, not its token.
      x = jnp.where(positions.cache_index == added, x[:, added:], targets)
    # [1, 1, q, k] & [batch, 1, 1, k]
    seen = positions.queries[:, None] >= positions.keys[None, :]
    mask = (seen | (positions.keys <= added)[None, :])[None, None]
    if not decode:
      wanted = target_tokens != cfg.ids.pad
      mask &= grow(wanted, x.shape[1])[:, None, None, :]
    mask = adapt(self, place, 'mask', tokens, mask)

    real = encoder_tokens != cfg.ids.pad
    encoder_tokens = jnp.where(real, encoder_tokens, PADDING)
    inputs = grow(real, encoded.shape[1])[:, None, None, :]
    inputs = adapt(self, place, 'encoder_mask', encoder_tokens, inputs)
    inputs = padded_in_front(inputs[:, 0, 0], real)
    # `mask` already holds the positions of the targets, which come last.
    behind = ((0, 0), (0, mask.shape[-1] - inputs.shape[1]))
    inputs = jnp.pad(inputs, behind, constant_values=True)
    mask &= inputs[:, None, None, :]

    x = t5.decoder_layers(
      self,
      cfg,
      place,
      drop(x),
      None,
      mask,
      None,
      positions,
      prefill=added > 0,
      enable_dropout=enable_dropout,
    )
    x = x[:, -tokens.shape[1] :]
    return head.logits(self, cfg, place, self.output_embedder, tokens, x, drop)


def padded_in_front(x: jax.Array, real: jax.Array) -> jax.Array:
  """Moves the padding from the end of rows to their front.

  Args:
    x: [batch, ...]; the end of its second axis is the end of `real`.
    real: [batch, length], False at the padding, which is at the end.
  """
  padding = jnp.sum(~real, axis=1)
  return jax.vmap(lambda row, by: jnp.roll(row, by, axis=0))(x, padding)
