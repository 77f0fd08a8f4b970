"""SMoP: a router picks one of several short prompts for each input.

Choi, Kim, Park, Mok and Lee 2023, "SMoP: Towards Efficient and Effective Prompt
Tuning with Sparse Mixture-of-Prompts" (EMNLP 2023). With the prompts
P_1 ... P_n [prompt, embed] and the mean x of a row's embedded tokens
X [length, embed], padding left out, the encoder reads

    [p_c P_c; X]     p = softmax(x R), c the largest of p, R [embed, n]

The factor p_c gives the router a gradient. In training (with dropout), every
logit of the router is multiplied by 1 + noise * N(0, 1), so that all prompts
are tried.

Trained: the prompts and R; 18,432 parameters for 4 prompts of 5 tokens and T5
base.

A bank of prompts takes SMoP beside plain prompts, see `row_prompts`. Programs
that know only plain prompts cannot read it.

    --gin_file=methods/smop.gin
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from ptune.errors import UserError
from ptune.methods import prompt_init
from ptune.methods.adapter_layers import PROMPT_AXES
from ptune.methods.prompt import check_length
from ptune.model.adapters import PADDING, Method, Placement
from ptune.model.layers import Dense

PATH = 'encoder/routed_prompts/prompts'
ROUTER = 'encoder/routed_prompts/router/kernel'


class Routed(NamedTuple):
  """The parameters that SMoP trained.

  Attributes:
    prompts: [prompts, prompt, embed].
    router: [embed, prompts].
  """

  prompts: np.ndarray
  router: np.ndarray


def mean_token(x: jax.Array, y: jax.Array) -> jax.Array:
  """The mean of the embedded tokens of each row, [batch, embed] float32.

  Args:
    x: [batch, length] the tokens, with PADDING where there is none.
    y: [batch, length, embed] their embeddings.
  """
  real = (x != PADDING)[..., None]
  return jnp.sum(y * real, axis=1, dtype=jnp.float32) / jnp.maximum(
    jnp.sum(real, axis=1), 1
  )


def chosen(logits: jax.Array) -> jax.Array:
  """[batch, prompts]: the probability of the likeliest prompt, and zeros."""
  best = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
  return best * nn.softmax(logits)


class RoutedPrompts(nn.Module):
  """Inserts the prompt that the router picks before each row.

  Attributes:
    prompts: Number of prompts.
    length: Rows of each prompt.
    noise: Noise of the router in training.
  """

  prompts: int
  length: int
  noise: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """Inserts prompts.

    Args:
      x: [batch, length] the tokens, with PADDING at padding.
      y: [batch, length, embed] their embeddings. Returns: [batch, prompt +
        length, embed]
    """
    embed = y.shape[-1]
    # One array for all prompts, because initialisers fill [prompt, embed].
    prompts = partitioning.param_with_axes(
      'prompts',
      nn.initializers.uniform(1.0),
      (self.prompts * self.length, embed),
      jnp.float32,
      axes=('prompt', 'prompt_embed'),
    ).reshape(self.prompts, self.length, embed)
    logits = Dense(self.prompts, PROMPT_AXES, name='router')(mean_token(x, y))
    if self.has_rng('dropout'):
      noise = jax.random.normal(self.make_rng('dropout'), logits.shape)
      logits *= 1 + self.noise * noise
    # A product, because the gradient of a gather is summed in no fixed order.
    prompt = jnp.einsum(
      'bn,npe->bpe', chosen(logits), prompts, precision='highest'
    )
    return jnp.concatenate([prompt.astype(y.dtype), y], axis=1)


def smop(
  length: int = 5,
  prompts: int = 4,
  noise: float = 1.0,
  init: prompt_init.Initializer | None = None,
) -> Method:
  """Prompts of `length` tokens, and their router.

  Args:
    length: Rows of each prompt (PROMPT_LENGTH).
    prompts: Number of prompts.
    noise: Noise of the router in training.
    init: Initialiser from `prompt_init` for all prompts, stacked as the rows of
      one.

  Raises:
    UserError: If a size is below 1, or the noise below 0.
  """
  check_length(length)
  if prompts < 1 or noise < 0:
    raise UserError(
      f'SMoP has {prompts} prompts and noise {noise}; it needs at least 1'
      ' prompt, and noise of at least 0'
    )
  adapter = functools.partial(
    RoutedPrompts, prompts=prompts, length=length, noise=noise
  )
  return Method(
    name='smop',
    placements=(Placement('encoder/embed', 'routed_prompts', adapter),),
    trainable=('encoder/routed_prompts/*',),
    initial={PATH: init or prompt_init.random_uniform()},
  )
