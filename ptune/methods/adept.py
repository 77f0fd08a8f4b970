"""ADePT: a short prompt, and a small network that moves the input embeddings.

Tang, Hu and Liu 2025, "ADePT: Adaptive Decomposed Prompt Tuning" (arXiv
2501.03291). With the embedded tokens X [length, embed] of a row, the encoder
reads

    [P; X + relu(X D + c) U + b]     P [prompt, embed], D [embed, bottleneck],
                                     U [bottleneck, embed]

so that a token has the same addition wherever it stands. U and b start at zero:
the model starts as with the prompt alone.

Trained: P, D, c, U and b; by default 76,061 numbers for T5 base, as many as the
paper's. The network needs a learning rate of its own, far below the prompt's,
which the gin file gives it by `optim.grouped`.

    --gin_file=methods/adept.gin
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

from ptune.errors import UserError
from ptune.methods import prompt_init
from ptune.methods.dept import with_offsets
from ptune.methods.p_tuning import AXES
from ptune.model.adapters import Method
from ptune.model.layers import Dense


class TokenOffsets(nn.Module):
  """Adds to each embedded token what a small network makes of it."""

  bottleneck: int

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """y [batch, length, embed] -> the same shape."""
    del x
    zeros, embed = nn.initializers.zeros, y.shape[-1]
    down, up = (
      partitioning.param_with_axes(
        f'{name}_bias', zeros, (size,), jnp.float32, axes=(axis,)
      ).astype(y.dtype)[None, None]
      for name, size, axis in (
        ('down', self.bottleneck, AXES[1]),
        ('up', embed, AXES[0]),
      )
    )
    h = Dense(self.bottleneck, AXES, y.dtype, name='down')(y)
    h = nn.relu(h + down)
    return (
      y
      + Dense(embed, AXES[::-1], y.dtype, kernel_init=zeros, name='up')(h)
      + up
    )


def adept(
  length: int = 40,
  bottleneck: int = 29,
  init: prompt_init.Initializer | None = None,
) -> Method:
  """A prompt of `length` tokens, and a network on the embedded tokens.

  Args:
    length: Rows of the prompt (PROMPT_LENGTH).
    bottleneck: Units of the network.
    init: One of `prompt_init`, of the prompt.

  Raises:
    ValueError: If a size is below 1.
  """
  if bottleneck < 1:
    raise UserError(f'bottleneck is {bottleneck}; it must be at least 1')
  offsets = functools.partial(TokenOffsets, bottleneck=bottleneck)
  return with_offsets('adept', length, offsets, init)
