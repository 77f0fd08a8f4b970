"""Prompt tuning: a learned prompt before the encoder's input.

Lester, Al-Rfou and Constant 2021, "The Power of Scale for Parameter-Efficient
Prompt Tuning" (arXiv 2104.08691). With the prompt P [prompt, embed] and a
row's embedded tokens X [length, embed], the encoder reads

    [P; X]  [prompt + length, embed]

Trained: P alone, prompt * embed numbers (51,200 for 100 tokens and T5 1.1
small).

    --gin_file=methods/prompt.gin, or a file of prompts/ to initialise it

Where the rows of a batch have prompts of their own (`per_row`), shorter ones
are padded on the left, so that a row reads [padding; P; X] and distances are
those of [P; X]; the padding is hidden from all that is read.

Packed rows have the prompt before each example: [P; X1; P; X2] (`packed`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from ptune.errors import UserError
from ptune.methods import prompt_init
from ptune.model.adapters import (
  PADDING,
  VIRTUAL,
  Method,
  Packed,
  Placement,
  Rows,
)

SCOPE = 'encoder/prompt/prompt'
PATH = f'{SCOPE}/prompt'
POSITIONS = ('start', 'after_first', 'before_eos')
# Of `per_row`.
ROWS = 'encoder/row_prompts/prompts'
LENGTHS = ('encoder/row_lengths/lengths', 'decoder/row_lengths/lengths')


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


class ReadPrompt(nn.Module):
  """Puts rows of a prompt where virtual tokens stand, see `adapters.Packed`.

  Attributes:
    source: The module that holds, or makes, the prompt, [..., embed].
  """

  source: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """x [batch, length], y [batch, length, embed] -> the shape of y."""
    prompt = self.source(name='prompt')(y.shape[-1])
    prompt = prompt.reshape(-1, y.shape[-1])
    # A product, not a gather, whose gradient would be summed in any order.
    rows = jax.nn.one_hot(x - VIRTUAL, prompt.shape[0])
    read = jnp.einsum('blp,pe->ble', rows, prompt, precision='highest')
    return jnp.where((x >= VIRTUAL)[..., None], read.astype(y.dtype), y)


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


class RowPrompts(nn.Module):
  """Puts before the tokens of every row a prompt of its own.

  The parameter is float32 [batch, prompt, embed], of any prompt length.
  """

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """y [batch, length, embed] -> [batch, prompt + length, embed]."""
    del x
    rows, _, embed = y.shape
    prompts = partitioning.param_with_axes(
      'prompts',
      nn.initializers.zeros,
      (rows, _given(self, 'prompts', 1, axis=1), embed),
      jnp.float32,
      axes=('batch', 'prompt', 'prompt_embed'),
    )
    return jnp.concatenate([prompts.astype(y.dtype), y], axis=1)


class RowLengths(nn.Module):
  """Hides the padding before prompts that are shorter than others.

  The parameter, int32 [batch], is how long each row's prompt is.
  """

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """Masks the first positions of the encoder.

    Args:
      x: [batch, length] the encoder's tokens; [batch * beams, length] in the
        decoder of a beam search.
      y: Which positions are seen, [batch, heads, q, k] or what broadcasts to
        it; k is prompt + length.

    Returns:
      The same, [batch, heads, q, k] or what broadcasts to it.
    """
    rows = _given(self, 'lengths', x.shape[0], axis=0)
    lengths = partitioning.param_with_axes(
      'lengths', nn.initializers.ones, (rows,), jnp.int32, axes=('batch',)
    )
    lengths = jnp.repeat(lengths, x.shape[0] // rows)  # For every beam.
    longest = y.shape[-1] - x.shape[1]
    shown = jnp.arange(y.shape[-1])[None, :] >= (longest - lengths)[:, None]
    return y & shown[:, None, None, :]


def _given(module: nn.Module, name: str, default: int, axis: int) -> int:
  """The size of a parameter that says its own."""
  if not module.has_variable('params', name):
    return default
  return module.get_variable('params', name).shape[axis]


def per_row() -> tuple[Placement, ...]:
  """The adapters with which every row of a batch has a prompt of its own.

  Their parameters, see `row_parameters`, are made for each batch.
  """
  return (
    Placement('encoder/embed', 'row_prompts', RowPrompts),
    Placement('encoder/mask', 'row_lengths', RowLengths),
    Placement('decoder/encoder_mask', 'row_lengths', RowLengths),
  )


def row_parameters(
  prompts: jax.Array, lengths: jax.Array
) -> dict[str, jax.Array]:
  """The parameters of `per_row`, by path.

  Args:
    prompts: [batch, prompt, embed] float32; those shorter than the longest
      stand at its end.
    lengths: [batch] int32, how long they are.
  """
  return {ROWS: prompts, **dict.fromkeys(LENGTHS, lengths)}


def packed(
  stack: str,
  source: Callable[..., nn.Module],
  length: int,
  position: str = 'start',
  causal: bool = False,
) -> Packed:
  """A prompt of `length` rows in packed examples, as `prompt` has it.

  Args:
    stack: 'encoder' or 'decoder'.
    source: The module that holds, or makes, the prompt.
    length: Rows of the prompt.
    position: Where it stands among the tokens of an example.
    causal: Whether its rows see only those before them.
  """

  def insert(tokens: np.ndarray) -> np.ndarray:
    count = len(tokens)
    before = {
      'start': 0,
      'after_first': min(1, count),
      'before_eos': max(count - 1, 0),
    }[position]
    return np.insert(tokens, before, VIRTUAL + np.arange(length))

  adapter = functools.partial(ReadPrompt, source=source)
  return Packed(
    placements=(
      Placement(f'{stack}/embed', 'prompt', adapter),
      *(causal_mask(None) if causal else ()),
    ),
    insert={stack: (length, insert)},
  )


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
    packed=packed('encoder', source, length, position, causal),
  )


def made_prompt(
  name: str,
  length: int,
  source: Callable[..., nn.Module],
  fold: Callable[[Mapping[str, np.ndarray], Rows], Any],
  initial: Mapping[str, prompt_init.Initializer] | None = None,
  settings: Mapping[str, Any] | None = None,
) -> Method:
  """A prompt that a module makes of what is trained, and that is saved alone.

  Args:
    name: Of the method.
    length: Rows of the prompt (PROMPT_LENGTH).
    source: The module, in place of `Prompt`.
    fold: What the module makes, [prompt, embed], of its parameters by name
      (float32, NumPy) and of rows of the base's embedding.
    initial: `Method.initial`, by the name of the parameter.
    settings: `Method.settings`.

  Raises:
    ValueError: If the length is below 1.
  """
  check_length(length)

  def fold_all(trained, rows):
    # On the host: one process alone may ask for it.
    own = {k.removeprefix(f'{SCOPE}/'): np.array(x) for k, x in trained.items()}
    return {PATH: np.asarray(fold(own, rows), np.float32)}

  return Method(
    name=name,
    placements=(
      Placement(
        'encoder/embed',
        'prompt',
        functools.partial(InsertPrompt, length=length, source=source),
      ),
    ),
    trainable=(f'{SCOPE}/*',),
    prompt=PATH,
    fold=fold_all,
    settings=dict(settings or {}),
    initial={f'{SCOPE}/{k}': init for k, init in (initial or {}).items()},
    packed=packed('encoder', functools.partial(source, length=length), length),
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
