"""The output layer of a decoder: from its last layer to logits."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ptune.model.adapters import Placement, adapt
from ptune.model.layers import Dense, Embed, LayerNorm, cap, constrain
from ptune.model.sizes import Config


def logits(
  decoder: nn.Module,
  config: Config,
  placements: tuple[Placement, ...],
  embedder: Embed,
  tokens: jax.Array,
  x: jax.Array,
  dropout: nn.Dropout,
) -> jax.Array:
  """The final norm, the site `output`, and the logits.

  Call it in a compact method of `decoder`, which owns the parameters.

  Args:
    decoder: The decoder.
    config: Its sizes.
    placements: All placements of the network.
    embedder: Makes the logits, if config.logits_via_embedding.
    tokens: [batch, length] the decoder's tokens, for the adapters at the site.
    x: [batch, length, embed] output of the last layer.
    dropout: Applied after the norm.

  Returns:
    [batch, length, vocab] float32.
  """
  dtype = jnp.dtype(config.dtype)
  norm = LayerNorm(dtype, offset=config.norm_offset, name='decoder_norm')
  x = adapt(decoder, placements, 'output', tokens, dropout(norm(x)))
  if config.scales_outputs:
    x = x * config.emb_dim**-0.5
  if config.logits_via_embedding:
    y = embedder.attend(x)
  else:
    y = Dense(
      config.vocab_size,
      ('embed', 'vocab'),
      dtype,
      out_dtype=jnp.float32,
      name='logits_dense',
    )(x)
  return constrain(cap(y, config.logits_cap), 'batch', 'length', 'vocab')
