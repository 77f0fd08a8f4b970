"""Residual prompt tuning: a small network changes the prompt that is trained.

Razdaibiedina, Mao, Hou, Khabsa, Lewis, Ba and Almahairi 2023, "Residual
Prompt Tuning" (arXiv 2305.03937), section 3. With a prompt P [prompt, embed],
the encoder reads

    P' = P + norm(relu(P A) B)

A [embed, bottleneck], B [bottleneck, embed], the same for all rows; norm is a
layer norm with mean, scale and bias.

Trained: P, A, B and the norm. Only P' is needed afterwards: a run writes P' to
`prompts/`, and methods/prompt.gin reads it.

    --gin_file=methods/residual.gin
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from ptune.errors import UserError
from ptune.methods import prompt_init
from ptune.methods.adapter_layers import PROMPT_AXES, narrow_mlp, vector
from ptune.methods.p_tuning import encoded_prompt
from ptune.model.adapters import Method


class Residual(nn.Module):
  """P -> P + norm(relu(P A) B).

  Attributes:
    bottleneck: Columns of A.
  """

  bottleneck: int

  @nn.compact
  def __call__(self, rows: jax.Array) -> jax.Array:
    """[prompt, embed] -> the same shape."""
    embed = rows.shape[-1]
    scale = vector('scale', nn.initializers.ones, embed, PROMPT_AXES[0])
    bias = vector('bias', nn.initializers.zeros, embed, PROMPT_AXES[0])
    added = narrow_mlp(rows, self.bottleneck)
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
    bottleneck: Hidden units of the network.
    init: The initialiser of P from `prompt_init`.

  Raises:
    UserError: If a size is below 1.
  """
  if bottleneck < 1:
    raise UserError(f'bottleneck is {bottleneck}; it must be at least 1')
  module = functools.partial(Residual, bottleneck=bottleneck)
  return encoded_prompt('residual', length, module, init)
