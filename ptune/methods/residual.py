"""Residual prompt tuning: a prompt, and what a small network adds to it.

Razdaibiedina, Mao, Hou, Khabsa, Lewis, Ba and Almahairi 2023, "Residual
Prompt Tuning" (arXiv 2305.03937), section 3. With a prompt P [prompt, embed],
the encoder reads

    P' = P + norm(relu(P A) B)

A [embed, bottleneck], B [bottleneck, embed], the same for all rows; norm is a
layer norm with mean, scale and bias.

Trained: P, A, B and the norm. Afterwards only P' is needed: it is what a run
writes to `prompts/`, to be used with methods/prompt.gin.

    --gin_file=methods/residual.gin
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

from ptune.errors import UserError
from ptune.methods import prompt_init
from ptune.methods.p_tuning import AXES, encoded_prompt
from ptune.model.adapters import Method
from ptune.model.layers import Dense


class Residual(nn.Module):
  """See the module."""

  bottleneck: int

  @nn.compact
  def __call__(self, rows: jax.Array) -> jax.Array:
    """[prompt, embed] -> the same shape."""
    embed = rows.shape[-1]
    scale, bias = (
      partitioning.param_with_axes(
        name, init, (embed,), jnp.float32, axes=AXES[:1]
      )[None, :]
      for name, init in (
        ('scale', nn.initializers.ones),
        ('bias', nn.initializers.zeros),
      )
    )
    hidden = nn.relu(Dense(self.bottleneck, AXES, name='wi')(rows))
    added = Dense(embed, AXES[::-1], name='wo')(hidden)
    variance = jnp.var(added, axis=-1, keepdims=True)
    return rows + nn.standardize(added, variance=variance) * scale + bias


def residual(
  length: int = 100,
  bottleneck: int = 400,
  init: prompt_init.Initializer | None = None,
) -> Method:
  """A prompt of `length` tokens with a residual network.

  Args:
    length: Rows of the prompt (PROMPT_LENGTH).
    bottleneck: Units of the network.
    init: One of `prompt_init`, of P.

  Raises:
    ValueError: If a size is below 1.
  """
  if bottleneck < 1:
    raise UserError(f'bottleneck is {bottleneck}; it must be at least 1')
  module = functools.partial(Residual, bottleneck=bottleneck)
  return encoded_prompt('residual', length, module, init)
