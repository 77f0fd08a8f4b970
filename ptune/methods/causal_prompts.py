"""Causal prompts: a prompt's rows attend only to the rows before them.

They attend to all of the input. The paper's implementation of multitask prompts
has this mask; prompt tuning (Lester et al. 2021) has none.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from ptune.model.adapters import VIRTUAL, Placement


class CausalPrompt(nn.Module):
  """Hides from each row of a prompt the rows after it.

  Attributes:
    length: The prompt is the first `length` positions; None if virtual tokens
      mark it.
  """

  length: int | None

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """y [batch, heads, q, k], or what broadcasts to it -> the same."""
    positions = jnp.arange(y.shape[-1])
    behind = positions[None, :] > positions[:, None]
    if self.length is None:
      prompt = x >= VIRTUAL
    else:
      prompt = (positions < self.length)[None]
    hidden = behind[None] & prompt[:, None, :]
    return y & ~hidden[:, None]


def causal_mask(length: int | None) -> tuple[Placement, ...]:
  """Places `CausalPrompt` at the encoder's mask."""
  mask = functools.partial(CausalPrompt, length=length)
  return (Placement('encoder/mask', 'causal_prompt', mask),)
