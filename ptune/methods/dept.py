"""DePT: a short prompt, and a low-rank addition to the input embeddings.

Shi and Lipani 2023, "DePT: Decomposed Prompt Tuning" (arXiv 2309.05173). With
the embedded tokens X [length, embed] of a row, the encoder reads

    [P; X + (A B)[:length]]     P [prompt, embed],
                                A [positions, rank], B [rank, embed]

so each position has its own offset, the same for all inputs. B starts at zero,
so training starts from the model with the prompt alone.

Trained: P, A and B. The defaults, 40 rows and 256 positions of rank 45, have
76,800 parameters for T5 base, as many as a prompt of 100 tokens. A and B need a
much lower learning rate than the prompt, which the gin file sets with
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
from ptune.methods.adapter_layers import PROMPT_AXES
from ptune.methods.prompt import PATH, check_length, insert
from ptune.model.adapters import Method, Placement


class PositionOffsets(nn.Module):
  """Adds a trained offset to the embedded token at each position.

  Attributes:
    positions: Rows of A.
    rank: Columns of A.
  """

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
      axes=('prompt', PROMPT_AXES[1]),
    )
    b = partitioning.param_with_axes(
      'b',
      nn.initializers.zeros,
      (self.rank, y.shape[-1]),
      jnp.float32,
      axes=PROMPT_AXES[::-1],
    )
    length = y.shape[1]
    # Padding may go beyond the last position; `dept` checks the tokens.
    a = jnp.pad(a[:length], ((0, max(0, length - self.positions)), (0, 0)))
    return y + jnp.matmul(a, b, precision='highest').astype(y.dtype)[None]


def with_offsets(
  name: str,
  length: int,
  offsets: functools.partial,
  init: prompt_init.Initializer | None,
  **others,
) -> Method:
  """A method with a prompt before embedded tokens that an adapter changes.

  Args:
    name: Name of the method.
    length: Rows of the prompt (PROMPT_LENGTH).
    offsets: Makes the adapter; its parameters are `encoder/offset/...`.
    init: Initialiser of the prompt.
    **others: Other attributes of `Method`.
  """
  check_length(length)
  return Method(
    name=name,
    placements=(
      Placement('encoder/embed', 'offset', offsets),
      insert(length),
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
  """A prompt of `length` tokens, and offsets of the first `positions` tokens.

  Args:
    length: Rows of the prompt (PROMPT_LENGTH).
    rank: Rank of the offsets.
    positions: Tokens of the longest input; longer inputs are refused.
    init: The prompt's initialiser from `prompt_init`.

  Raises:
    UserError: If a size is below 1.
  """
  if rank < 1 or positions < 1:
    raise UserError(
      f'DePT got rank = {rank} and positions = {positions}; both must be at'
      ' least 1'
    )

  def check(tokens):
    longest = np.max(np.sum(tokens != 0, axis=1))
    if longest > positions:
      raise UserError(
        f'an input has {longest} tokens, but DePT has offsets for {positions};'
        ' set dept.dept.positions to the length of your inputs, or lower'
        ' TASK_FEATURE_LENGTHS'
      )

  offsets = functools.partial(PositionOffsets, positions=positions, rank=rank)
  return with_offsets('dept', length, offsets, init, check=check)
