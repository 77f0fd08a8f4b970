"""Prompt tuning: a learned prompt before the encoder's input.

Lester, Al-Rfou and Constant 2021, "The Power of Scale for Parameter-Efficient
Prompt Tuning" (arXiv 2104.08691). With the prompt P [prompt, embed] and a
row's embedded tokens X [length, embed], the encoder reads

    [P; X]  [prompt + length, embed]

Trained: P alone, prompt * embed numbers (51,200 for 100 tokens and T5 1.1
small).

    --gin_file=methods/prompt.gin, or a file of prompts/ to initialise it
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

from ptune.errors import UserError
from ptune.methods import prompt_init
from ptune.methods.packed_prompts import packed
from ptune.model.adapters import (
  PADDING,
  VIRTUAL,
  Method,
  Placement,
)

SCOPE = 'encoder/prompt/prompt'
PATH = f'{SCOPE}/prompt'
POSITIONS = ('start', 'after_first', 'before_eos')


class Prompt(nn.Module):
  """The parameter, float32 [prompt, embed], by T5X's name and axes."""

  length: int
  init: nn.initializers.Initializer = nn.initializers.uniform(1.0)

  @nn.compact
  def __call__(self, embed: int) -> jax.Array:
    return partitioning.param_with_axes(
      'prompt',
      self.init,
      (self.length, embed),
      jnp.float32,
      axes=('prompt', 'prompt_embed'),
    )


class InsertPrompt(nn.Module):
  """Puts one prompt among the embedded tokens of every row.

  Attributes:
    length: Rows of the prompt.
    position: 'start'; 'after_first', behind the first token; 'before_eos',
      behind the last token but its EOS.
    source: The module that holds, or makes, the prompt; called as `Prompt`.
  """

  length: int
  position: str = 'start'
  source: Callable[..., nn.Module] = Prompt

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """Inserts the prompt.

    Args:
      x: [batch, length] the tokens, with PADDING at the end.
      y: [batch, length, embed] their embeddings.

    Returns:
      [batch, prompt + length, embed]
    """
    prompt = self.source(length=self.length, name='prompt')(y.shape[-1])
    prompt = jnp.broadcast_to(
      prompt.astype(y.dtype), (y.shape[0], *prompt.shape)
    )
    both = jnp.concatenate([prompt, y], axis=1)
    if self.position == 'start':
      return both
    tokens = jnp.sum(x != PADDING, axis=1)
    before = 1 if self.position == 'after_first' else tokens - 1
    before = jnp.clip(before, 0, tokens)[:, None]
    # Where each position of the result lies in [prompt; tokens]:
    # `before` tokens, the prompt, the other tokens.
    i = jnp.arange(both.shape[1])[None, :]
    source = jnp.where(
      i < before,
      i + self.length,
      jnp.where(i < before + self.length, i - before, i),
    )
    return jnp.take_along_axis(both, source[..., None], axis=1)


class CausalPrompt(nn.Module):
  """Hides from each row of a prompt those behind it.

  Attributes:
    length: The prompt is the first `length` positions; None where it is
      virtual tokens.
  """

  length: int | None

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """y [batch, heads, q, k] or what broadcasts to it -> the same."""
    positions = jnp.arange(y.shape[-1])
    behind = positions[None, :] > positions[:, None]
    if self.length is None:
      prompt = x >= VIRTUAL
    else:
      prompt = (positions < self.length)[None]
    hidden = behind[None] & prompt[:, None, :]
    return y & ~hidden[:, None]


def prompt(
  length: int = 100,
  init: prompt_init.Initializer | None = None,
  position: str = 'start',
  causal: bool = False,
) -> Method:
  """A soft prompt of `length` tokens; the rest of the model is frozen.

  Args:
    length: Rows of the prompt (PROMPT_LENGTH).
    init: One of `prompt_init`; the paper's random uniform if not given.
    position: Where it stands, see `InsertPrompt`.
    causal: Whether its rows see only those before them, and all of the input,
      as the prompts of `multitask` do.

  Raises:
    ValueError: If the length is below 1, the position unknown, or a causal
      prompt not at the start.
  """
  check_length(length)
  if position not in POSITIONS:
    raise UserError(f'prompt position {position!r} is not one of {POSITIONS}')
  if causal and position != 'start':
    raise UserError(
      f"a causal prompt stands at position 'start', not at {position!r}"
    )
  adapter = functools.partial(InsertPrompt, length=length, position=position)
  kind = 'causal' if causal else position
  source = functools.partial(Prompt, length=length)
  return Method(
    name='prompt' if kind == 'start' else f'prompt/{kind}',
    placements=(
      Placement('encoder/embed', 'prompt', adapter),
      *(causal_mask(length) if causal else ()),
    ),
    trainable=(PATH,),
    prompt=PATH,
    initial={PATH: init or prompt_init.random_uniform()},
    packed=packed(
      'encoder', source, length, position, causal_mask(None) if causal else ()
    ),
  )


def causal_mask(length: int | None) -> tuple[Placement, ...]:
  """Places `CausalPrompt` at the encoder's mask."""
  mask = functools.partial(CausalPrompt, length=length)
  return (Placement('encoder/mask', 'causal_prompt', mask),)


def check_length(length: int) -> None:
  """Raises a ValueError if a prompt cannot have this length."""
  if not isinstance(length, int) or length < 1:
    raise UserError(
      f'PROMPT_LENGTH is {length!r}; it must be at least 1, a whole number'
    )
