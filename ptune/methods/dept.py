"""DePT: a short prompt, and a low-rank addition to the input embeddings.

Shi and Lipani 2023, "DePT: Decomposed Prompt Tuning" (arXiv 2309.05173). With
the embedded tokens X [length, embed] of a row, the encoder reads

    [P; X + (A B)[:length]]     P [prompt, embed],
                                A [positions, rank], B [rank, embed]

so that every position has an addition of its own, the same for all inputs. B
starts at zero: the model starts as with the prompt alone.

Trained: P, A and B; by default 40 + 256 positions of rank 45, which for T5 base
are the 76,800 numbers of a prompt of 100 tokens. A and B need a learning rate
of their own, far below the prompt's, which the gin file gives them by
`optim.grouped`.

    --gin_file=methods/dept.gin
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from ptune.errors import UserError
from ptune.methods import prompt_init
from ptune.methods.p_tuning import AXES
from ptune.methods.prompt import PATH, InsertPrompt, check_length
from ptune.model.adapters import Method, Placement


class PositionOffsets(nn.Module):
  """Adds to each embedded token what its position has learned."""

  positions: int
  rank: int

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """y [batch, length, embed] -> the same shape."""
    del x
    a = partitioning.param_with_axes(
      'a',
      nn.initializers.normal(self.rank**-0.5),
      (self.positions, self.rank),
      jnp.float32,
      axes=('prompt', AXES[1]),
    )
    b = partitioning.param_with_axes(
      'b',
      nn.initializers.zeros,
      (self.rank, y.shape[-1]),
      jnp.float32,
      axes=AXES[::-1],
    )
    length = y.shape[1]
    # A batch may be padded beyond the positions; `dept` checks its tokens.
    a = jnp.pad(a[:length], ((0, max(0, length - self.positions)), (0, 0)))
    return y + jnp.matmul(a, b, precision='highest').astype(y.dtype)[None]


def with_offsets(
  name: str,
  length: int,
  offsets: functools.partial,
  init: prompt_init.Initializer | None,
  **others,
) -> Method:
  """A prompt before embedded tokens that an adapter changes.

  Args:
    name: Of the method.
    length: Rows of the prompt (PROMPT_LENGTH).
    offsets: Makes the adapter, whose parameters are `encoder/offset/...`.
    init: Of the prompt.
    **others: Attributes of `Method`.
  """
  check_length(length)
  return Method(
    name=name,
    placements=(
      Placement('encoder/embed', 'offset', offsets),
      Placement(
        'encoder/embed',
        'prompt',
        functools.partial(InsertPrompt, length=length),
      ),
    ),
    trainable=(PATH, 'encoder/offset/*'),
    initial={PATH: init or prompt_init.random_uniform()},
    **others,
  )


def dept(
  length: int = 40,
  rank: int = 45,
  positions: int = 256,
  init: prompt_init.Initializer | None = None,
) -> Method:
  """A prompt of `length` tokens, and additions to the first `positions`.

  Args:
    length: Rows of the prompt (PROMPT_LENGTH).
    rank: Of the additions.
    positions: Longest input, in tokens; longer ones are refused.
    init: One of `prompt_init`, of the prompt.

  Raises:
    ValueError: If a size is below 1.
  """
  if rank < 1 or positions < 1:
    raise UserError(
      f'the rank of DePT is {rank}, for {positions} positions; both must be at'
      ' least 1'
    )

  def check(tokens):
    longest = np.max(np.sum(tokens != 0, axis=1))
    if longest > positions:
      raise UserError(
        f'an input has {longest} tokens, and DePT additions for {positions};'
        ' set dept.dept.positions to the length of your inputs, or lower'
        ' TASK_FEATURE_LENGTHS'
      )

  offsets = functools.partial(PositionOffsets, positions=positions, rank=rank)
  return with_offsets('dept', length, offsets, init, check=check)
