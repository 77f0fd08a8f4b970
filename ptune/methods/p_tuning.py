"""P-tuning: a small network computes the prompt from trained embeddings.

Liu, Zheng, Du, Ding, Qian, Yang and Tang 2021, "GPT Understands, Too" (arXiv
2103.10385), section 3.2. With embeddings H [prompt, embed], the prompt is

    mlp    P = relu(H A) B
    lstm   P = relu([forward(H); backward(H)] A) B

A [embed, hidden], B [hidden, embed], without biases because T5 has none. The
LSTMs, of hidden / 2 cells each, read the rows of H forward and backward.

Trained: H, A, B and the LSTMs. Only P is needed afterwards: a run writes P to
`prompts/`, and methods/prompt.gin reads it.

    --gin_file=methods/p_tuning.gin
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.linen import partitioning

from ptune.errors import UserError
from ptune.methods import prompt_init
from ptune.methods.adapter_layers import PROMPT_AXES, narrow_mlp
from ptune.methods.made_prompts import made_prompt
from ptune.model.adapters import Method
from ptune.model.layers import kernel_init

ENCODERS = ('mlp', 'lstm')


class Lstm(nn.Module):
  """An LSTM over the rows of a prompt, forward or backward.

  Attributes:
    hidden: Cells.
    backwards: Whether it starts at the last row.
  """

  hidden: int
  backwards: bool = False

  @nn.compact
  def __call__(self, rows: jax.Array) -> jax.Array:
    """[prompt, embed] -> [prompt, hidden]."""
    shape = (rows.shape[-1] + self.hidden, 4 * self.hidden)
    kernel = partitioning.param_with_axes(
      'kernel', kernel_init, shape, jnp.float32, axes=PROMPT_AXES
    )
    bias = partitioning.param_with_axes(
      'bias',
      nn.initializers.zeros,
      shape[1:],
      jnp.float32,
      axes=PROMPT_AXES[1:],
    )

    def read(carry, row):
      cell, output = carry
      gates = jnp.concatenate([row, output]) @ kernel + bias
      put, keep, show, new = jnp.split(gates, 4)
      # The 1 makes the LSTM remember until it learns to forget.
      cell = nn.sigmoid(keep + 1) * cell + nn.sigmoid(put) * jnp.tanh(new)
      output = nn.sigmoid(show) * jnp.tanh(cell)
      return (cell, output), output

    zeros = jnp.zeros(self.hidden)
    return jax.lax.scan(read, (zeros, zeros), rows, reverse=self.backwards)[1]


class Encoder(nn.Module):
  """H -> P, see the formulas above.

  Attributes:
    hidden: Hidden units.
    lstm: Whether two LSTMs read the rows first.
  """

  hidden: int
  lstm: bool = False

  @nn.compact
  def __call__(self, rows: jax.Array) -> jax.Array:
    """[prompt, embed] -> the same shape."""
    embed = rows.shape[-1]
    if self.lstm:
      half = self.hidden // 2
      forward = Lstm(half, name='forward')(rows)
      backward = Lstm(half, backwards=True, name='backward')(rows)
      rows = jnp.concatenate([forward, backward], axis=-1)
    return narrow_mlp(rows, self.hidden, features=embed)


class EncodedPrompt(nn.Module):
  """A prompt [prompt, embed] that `encoder` computes from its own embeddings.

  Attributes:
    length: Rows of the prompt.
    encoder: Makes the module [prompt, embed] -> [prompt, embed].
  """

  length: int
  encoder: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, embed: int) -> jax.Array:
    rows = partitioning.param_with_axes(
      'embedding',
      nn.initializers.uniform(1.0),
      (self.length, embed),
      jnp.float32,
      axes=('prompt', 'prompt_embed'),
    )
    return self.encoder(name='encoder')(rows)


def encoded_prompt(
  name: str,
  length: int,
  encoder: Callable[..., nn.Module],
  init: prompt_init.Initializer | None,
) -> Method:
  """A method whose prompt an encoder computes; only the prompt is saved.

  Args:
    name: Name of the method.
    length: Rows of the prompt (PROMPT_LENGTH).
    encoder: Makes the module [prompt, embed] -> [prompt, embed].
    init: Initialiser of the rows that the encoder reads.
  """
  source = functools.partial(EncodedPrompt, encoder=encoder)

  def fold(trained, rows):
    del rows
    params = traverse_util.unflatten_dict(dict(trained), sep='/')
    embed = trained['embedding'].shape[-1]
    return source(length=length).apply({'params': params}, embed)

  initial = {'embedding': init or prompt_init.random_uniform()}
  return made_prompt(name, length, source, fold, initial)


def p_tuning(
  length: int = 100,
  encoder: str = 'mlp',
  hidden: int = 512,
  init: prompt_init.Initializer | None = None,
) -> Method:
  """A prompt of `length` tokens that an encoder computes.

  Args:
    length: Rows of the prompt (PROMPT_LENGTH).
    encoder: 'mlp' or 'lstm'.
    hidden: Hidden units; each LSTM has half of them.
    init: Initialiser of the embeddings, from `prompt_init`.

  Raises:
    UserError: If a size is below 1, the encoder is unknown, or the units of an
      LSTM cannot be halved.
  """
  if encoder not in ENCODERS:
    raise UserError(f'encoder {encoder!r} is not one of {ENCODERS}')
  lstm = encoder == 'lstm'
  if hidden < 1 or (lstm and hidden % 2):
    raise UserError(
      f'hidden is {hidden}; it must be at least 1, and even for an LSTM'
    )
  module = functools.partial(Encoder, hidden=hidden, lstm=lstm)
  return encoded_prompt(f'p_tuning/{encoder}', length, module, init)
