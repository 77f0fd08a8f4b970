"""Prompt tuning: a learned prompt before the encoder's input.

Lester, Al-Rfou and Constant 2021, "The Power of Scale for Parameter-Efficient
Prompt Tuning" (arXiv 2104.08691). With the prompt P [prompt, embed] and a
row's embedded tokens X [length, embed], the encoder reads

    [P; X]  [prompt + length, embed]

Trained: P alone, prompt * embed parameters (51,200 for 100 tokens and T5 1.1
small).

    --gin_file=methods/prompt.gin

A file of prompts/, such as prompts/from_class_labels.gin, replaces this file
and also initialises the prompt.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

from ptune.errors import UserError
from ptune.methods import prompt_init
from ptune.methods.causal_prompts import causal_mask
from ptune.methods.packed_prompts import packed
from ptune.model.adapters import PADDING, Method, Placement

SCOPE = 'encoder/prompt/prompt'
PATH = f'{SCOPE}/prompt'
POSITIONS = ('start', 'after_first', 'before_eos')


class Prompt(nn.Module):
  """The parameter, [prompt, embed] float32, with T5X's name and axes."""

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
  """Inserts one prompt into the embedded tokens of every row.

  Attributes:
    length: Rows of the prompt.
    position: 'start'; 'after_first', after the first token; or 'before_eos',
      before the last token, which is the EOS.
    source: The module that owns or computes the prompt, instead of `Prompt`.
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
    # The result is `before` tokens, the prompt, the other tokens. This says
    # where each of its positions is in [prompt; tokens].
    i = jnp.arange(both.shape[1])[None, :]
    source = jnp.where(
      i < before,
      i + self.length,
      jnp.where(i < before + self.length, i - before, i),
    )
    return jnp.take_along_axis(both, source[..., None], axis=1)


def insert(
  length: int,
  stack: str = 'encoder',
  position: str = 'start',
  source: Callable[..., nn.Module] = Prompt,
) -> Placement:
  """Places `InsertPrompt` after the embedding of the encoder or decoder."""
  adapter = functools.partial(
    InsertPrompt, length=length, position=position, source=source
  )
  return Placement(f'{stack}/embed', 'prompt', adapter)


def prompt(
  length: int = 100,
  init: prompt_init.Initializer | None = None,
  position: str = 'start',
  causal: bool = False,
) -> Method:
  """A soft prompt of `length` tokens; the rest of the model is frozen.

  Args:
    length: Rows of the prompt (PROMPT_LENGTH).
    init: Its initialiser from `prompt_init`; the paper's random uniform if not
      given.
    position: Where the prompt is inserted, see `InsertPrompt`.
    causal: Whether its rows attend only to the rows before them and to the
      input, as those of `multitask` do.

  Raises:
    UserError: If the length is below 1, the position is unknown, or a causal
      prompt is not at the start.
  """
  check_length(length)
  if position not in POSITIONS:
    raise UserError(f'prompt position {position!r} is not one of {POSITIONS}')
  if causal and position != 'start':
    raise UserError(
      f"a causal prompt must be at position 'start', and got {position!r}"
    )
  kind = 'causal' if causal else position
  source = functools.partial(Prompt, length=length)
  return Method(
    name='prompt' if kind == 'start' else f'prompt/{kind}',
    placements=(
      insert(length, position=position),
      *(causal_mask(length) if causal else ()),
    ),
    trainable=(PATH,),
    prompt=PATH,
    initial={PATH: init or prompt_init.random_uniform()},
    packed=packed(
      'encoder', source, length, position, causal_mask(None) if causal else ()
    ),
  )


def check_length(length: int) -> None:
  """Raises a UserError if a prompt cannot have this length."""
  if not isinstance(length, int) or length < 1:
    raise UserError(
      f'PROMPT_LENGTH is {length!r}; expected a whole number of at least 1'
    )
