"""ULPT: a prompt in a few dimensions, projected up by a frozen random matrix.

Wu, Zhang, Cao, Li and Mou 2025, "Ultra-Low-Dimensional Prompt Tuning via Random
Projection" (arXiv 2502.04501). The prompt is

    P = (Z R) * s + b      Z [prompt, rank], R [rank, embed], s and b [embed]

R is drawn once, from a seed, with variance 1 / rank, and never trained or
saved. Z starts at U[-0.5, 0.5], s at 1 and b at 0; these starts are our choice.

Trained: Z, s and b, (prompt + 2 * embed / rank) * rank numbers (1,736 for 100
rows, rank 2 and T5 base; 7,936 for rank 64). A run writes P, for
methods/prompt.gin.

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
from ptune.methods.made_prompts import made_prompt
from ptune.methods.p_tuning import AXES
from ptune.model.adapters import Method


class Projected(nn.Module):
  """A prompt [prompt, embed] that a random matrix makes of a narrow one."""

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
      axes=('prompt', AXES[1]),
    )
    scale, shift = (
      partitioning.param_with_axes(
        name, init, (embed,), jnp.float32, axes=AXES[:1]
      )[None, :]
      for name, init in (
        ('scale', nn.initializers.ones),
        ('shift', nn.initializers.zeros),
      )
    )
    projection = jnp.asarray(random_matrix(self.rank, embed, self.seed))
    rows = jnp.matmul(rows, projection, precision='highest')
    return rows * scale + shift


def random_matrix(rank: int, embed: int, seed: int) -> np.ndarray:
  """R of the module, [rank, embed] float32: the same wherever it is drawn."""
  drawn = np.random.default_rng(seed).normal(size=(rank, embed))
  return (drawn / np.sqrt(rank)).astype(np.float32)


def ulpt(
  length: int = 100,
  rank: int = 64,
  seed: int = 0,
  init: prompt_init.Initializer | None = None,
) -> Method:
  """A prompt of `length` rows that are learned in `rank` dimensions.

  Args:
    length: Rows of the prompt (PROMPT_LENGTH).
    rank: Dimensions in which they are learned.
    seed: Draws the projection.
    init: One of `prompt_init` that needs no base, of Z.

  Raises:
    ValueError: If a size is below 1.
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
