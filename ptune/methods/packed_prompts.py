"""Prompts in packed rows: each example gets its own copy.

A row of two examples X1 and X2 reads [P; X1; P; X2], see `data.packing`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ptune.model.adapters import VIRTUAL, Packed, Placement


class ReadPrompt(nn.Module):
  """Replaces virtual tokens by rows of a prompt, see `adapters.Packed`.

  Attributes:
    source: The module that owns or computes the prompt, [..., embed].
  """

  source: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """x [batch, length], y [batch, length, embed] -> the shape of y."""
    prompt = self.source(name='prompt')(y.shape[-1])
    prompt = prompt.reshape(-1, y.shape[-1])
    # A product, because the gradient of a gather is summed in no fixed order.
    rows = jax.nn.one_hot(x - VIRTUAL, prompt.shape[0])
    read = jnp.einsum('blp,pe->ble', rows, prompt, precision='highest')
    return jnp.where((x >= VIRTUAL)[..., None], read.astype(y.dtype), y)


def packed(
  stack: str,
  source: Callable[..., nn.Module],
  length: int,
  position: str = 'start',
  others: tuple[Placement, ...] = (),
) -> Packed:
  """`Method.packed` of a method with a prompt of `length` rows.

  Args:
    stack: 'encoder' or 'decoder'.
    source: The module that owns or computes the prompt.
    length: Rows of the prompt.
    position: Where it is inserted into an example, see `prompt.InsertPrompt`.
    others: Other placements of the method.
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
      *others,
    ),
    insert={stack: (length, insert)},
  )
