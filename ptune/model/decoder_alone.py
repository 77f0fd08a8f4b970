"""What stands in the encoder's place before a decoder alone, a prefix LM."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ptune.errors import UserError
from ptune.model.adapters import PADDING, Placement, adapt
from ptune.model.layers import Embed, constrain
from ptune.model.sizes import T5Config


class Prefix(nn.Module):
  """What stands in the encoder's place before a decoder alone: embeddings.

  The decoder continues what it reads, so padding stands in front:

      a b </s> . .  ->  . . [prompt] a b </s>

  Sites: `embed` and `mask` as in the encoder. The mask is made by the decoder,
  at its site `encoder_mask`.
  """

  config: T5Config
  token_embedder: Embed
  placements: tuple[Placement, ...] = ()

  @nn.compact
  def __call__(self, tokens, segment_ids=None, *, enable_dropout=False):
    """[batch, length] -> [batch, length + what adapters add, embed]."""
    del enable_dropout  # The decoder drops.
    if segment_ids is not None:
      raise UserError('a decoder alone reads no packed examples; turn PACK off')
    x = self.token_embedder(tokens)
    real = tokens != self.config.ids.pad
    tokens = jnp.where(real, tokens, PADDING)
    x = adapt(self, self.placements, 'embed', tokens, x)
    adapt(self, self.placements, 'mask', tokens, real[:, None, None])
    return constrain(padded_in_front(x, real), 'batch', 'length', 'embed')


def padded_in_front(x: jax.Array, real: jax.Array) -> jax.Array:
  """Moves the padding from the end of rows to their front.

  Args:
    x: [batch, ...]; its second axis ends as `real` does.
    real: [batch, length], False at the padding, which is at the end.
  """
  padding = jnp.sum(~real, axis=1)
  return jax.vmap(lambda row, by: jnp.roll(row, by, axis=0))(x, padding)
