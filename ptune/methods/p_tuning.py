"""P-tuning: a prompt that a small network makes of trained embeddings.

Liu, Zheng, Du, Ding, Qian, Yang and Tang 2021, "GPT Understands, Too" (arXiv
2103.10385), section 3.2. With embeddings H [prompt, embed], the prompt is

    mlp    P = relu(H A) B
    lstm   P = relu([forward(H); backward(H)] A) B

A [embed, hidden], B [hidden, embed], without biases, as T5 has none; forward
and backward are LSTMs of hidden / 2 cells that read the rows of H in either
direction.

Trained: H, A and B, and the cells. Afterwards only P is needed: it is what a
run writes to `prompts/`, to be used with methods/prompt.gin.

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
from ptune.methods.made_prompts import made_prompt
from ptune.model.adapters import Method
from ptune.model.layers import Dense, kernel_init

AXES = ('prompt_embed', 'adapter_hidden')  # Of a map to hidden units.
ENCODERS = ('mlp', 'lstm')


class Lstm(nn.Module):
  """A long short-term memory that reads rows in order, or backwards."""

  hidden: int
  backwards: bool = False

  @nn.compact
  def __call__(self, rows: jax.Array) -> jax.Array:
    """[prompt, embed] -> [prompt, hidden]."""
    shape = (rows.shape[-1] + self.hidden, 4 * self.hidden)
    kernel = partitioning.param_with_axes(
      'kernel', kernel_init, shape, jnp.float32, axes=AXES
    )
    bias = partitioning.param_with_axes(
      'bias', nn.initializers.zeros, shape[1:], jnp.float32, axes=AXES[1:]
    )

    def read(carry, row):
      cell, output = carry
      gates = jnp.concatenate([row, output]) @ kernel + bias
      put, keep, show, new = jnp.split(gates, 4)
      # Keeps its cell until it has learned to forget.
      cell = nn.sigmoid(keep + 1) * cell + nn.sigmoid(put) * jnp.tanh(new)
      output = nn.sigmoid(show) * jnp.tanh(cell)
      return (cell, output), output

    zeros = jnp.zeros(self.hidden)
    return jax.lax.scan(read, (zeros, zeros), rows, reverse=self.backwards)[1]


class Encoder(nn.Module):
  """See the module."""

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
    rows = nn.relu(Dense(self.hidden, AXES, name='wi')(rows))
    return Dense(embed, AXES[::-1], name='wo')(rows)


class EncodedPrompt(nn.Module):
  """A prompt [prompt, embed] that `encoder` makes of embeddings of its size."""

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
  """A prompt behind an encoder, which is folded away.

  Args:
    name: Of the method.
    length: Rows of the prompt (PROMPT_LENGTH).
    encoder: Makes the module [prompt, embed] -> [prompt, embed].
    init: Of the rows that it reads.
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
  """A prompt of `length` tokens, made by an encoder.

  Args:
    length: Rows of the prompt (PROMPT_LENGTH).
    encoder: 'mlp' or 'lstm'.
    hidden: Units between its two maps; half of them of each LSTM.
    init: One of `prompt_init`, of the embeddings that it reads.

  Raises:
    ValueError: If a size is below 1, the encoder unknown, or the units of an
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
