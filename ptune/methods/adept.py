"""ADePT: a short prompt, and a small network that moves the input embeddings.

Tang, Hu and Liu 2025, "ADePT: Adaptive Decomposed Prompt Tuning" (arXiv
2501.03291). With the embedded tokens X [length, embed] of a row, the encoder
reads

    [P; X + relu(X D + c) U + b]     P [prompt, embed], D [embed, bottleneck],
                                     U [bottleneck, embed]

so a token gets the same offset at every position. U and b start at zero, so
training starts from the model with the prompt alone.

Trained: P, D, c, U and b. The defaults are the paper's: 76,061 parameters for
T5 base. The network needs a much lower learning rate than the prompt, which the
gin file sets with `optim.grouped`.

    --gin_file=methods/adept.gin
"""

import functools

import jax
from flax import linen as nn

from ptune.errors import UserError
from ptune.methods import prompt_init
from ptune.methods.adapter_layers import PROMPT_AXES, narrow_mlp, vector
from ptune.methods.dept import with_offsets
from ptune.model.adapters import Method


class TokenOffsets(nn.Module):
  """Adds the output of a small network to each embedded token.

  Attributes:
    bottleneck: Hidden units.
  """

  bottleneck: int

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """y [batch, length, embed] -> the same shape."""
    del x
    zeros = nn.initializers.zeros
    embed, hidden = PROMPT_AXES
    down = vector('down_bias', zeros, self.bottleneck, hidden)
    up = vector('up_bias', zeros, y.shape[-1], embed)
    offsets = narrow_mlp(
      y,
      self.bottleneck,
      names=('down', 'up'),
      bias=down.astype(y.dtype)[None],
      last_init=zeros,
    )
    return y + offsets + up.astype(y.dtype)[None]


def adept(
  length: int = 40,
  bottleneck: int = 29,
  init: prompt_init.Initializer | None = None,
) -> Method:
  """A prompt of `length` tokens, and a network on the embedded tokens.

  Args:
    length: Rows of the prompt (PROMPT_LENGTH).
    bottleneck: Hidden units of the network.
    init: The prompt's initialiser from `prompt_init`.

  Raises:
    UserError: If a size is below 1.
  """
  if bottleneck < 1:
    raise UserError(f'bottleneck is {bottleneck}; it must be at least 1')
  offsets = functools.partial(TokenOffsets, bottleneck=bottleneck)
  return with_offsets('adept', length, offsets, init)
