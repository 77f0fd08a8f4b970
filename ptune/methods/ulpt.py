"""ULPT: a low-dimensional prompt, projected up by a frozen random matrix.

Wu, Zhang, Cao, Li and Mou 2025, "Ultra-Low-Dimensional Prompt Tuning via Random
Projection" (arXiv 2502.04501). The prompt is

    P = (Z R) * s + b      Z [prompt, rank], R [rank, embed], s and b [embed]

R is drawn from a seed with variance 1 / rank. It is never trained or saved. Z
starts at U[-0.5, 0.5], s at 1 and b at 0; these starts are our choice.

Trained: Z, s and b, prompt * rank + 2 * embed parameters (1,736 for 100 rows,
rank 2 and T5 base; 7,936 for rank 64). A run writes P to `prompts/`, and
methods/prompt.gin reads it.

    --gin_file=methods/ulpt.gin
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from ptune.errors import UserError
from ptune.methods import prompt_init
from ptune.methods.adapter_layers import PROMPT_AXES, vector
from ptune.methods.made_prompts import made_prompt
from ptune.model.adapters import Method


class Projected(nn.Module):
  """(Z R) * s + b, [prompt, embed].

  Attributes:
    length: Rows of the prompt.
    rank: Columns of Z.
    seed: Draws R.
  """

  length: int
  rank: int
  seed: int = 0

  @nn.compact
  def __call__(self, embed: int) -> jax.Array:
    rows = partitioning.param_with_axes(
      'rows',
      nn.initializers.uniform(1.0),
      (self.length, self.rank),
      jnp.float32,
      axes=('prompt', PROMPT_AXES[1]),
    )
    scale = vector('scale', nn.initializers.ones, embed, PROMPT_AXES[0])
    shift = vector('shift', nn.initializers.zeros, embed, PROMPT_AXES[0])
    projection = jnp.asarray(random_matrix(self.rank, embed, self.seed))
    rows = jnp.matmul(rows, projection, precision='highest')
    return rows * scale + shift


def random_matrix(rank: int, embed: int, seed: int) -> np.ndarray:
  """R, [rank, embed] float32: the same on every host and device."""
  drawn = np.random.default_rng(seed).normal(size=(rank, embed))
  return (drawn / np.sqrt(rank)).astype(np.float32)


def ulpt(
  length: int = 100,
  rank: int = 64,
  seed: int = 0,
  init: prompt_init.Initializer | None = None,
) -> Method:
  """A prompt of `length` rows, trained in `rank` dimensions.

  Args:
    length: Rows of the prompt (PROMPT_LENGTH).
    rank: Dimensions of the trained rows.
    seed: Draws the projection.
    init: Initialiser of Z from `prompt_init`; it must not need the base model.

  Raises:
    UserError: If a size is below 1.
  """
  if rank < 1:
    raise UserError(f'the rank of ULPT is {rank}; it must be at least 1')

  def fold(trained, rows):
    del rows
    narrow, scale, shift = (trained[n] for n in ('rows', 'scale', 'shift'))
    projection = random_matrix(rank, scale.size, seed)
    return narrow @ projection * scale + shift

  return made_prompt(
    'ulpt',
    length,
    functools.partial(Projected, rank=rank, seed=seed),
    fold,
    {'rows': init or prompt_init.random_uniform()},
    {'rank': rank, 'seed': seed},
  )
