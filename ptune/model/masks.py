"""Masks: which positions a query may attend to."""

import jax
import jax.numpy as jnp

from ptune.errors import UserError


def grow(valid: jax.Array, length: int) -> jax.Array:
  """Fits a token mask to an array that an adapter made longer or shorter.

  Adapters add real positions, and padding is always at the end. So the new
  positions can be counted at the front, wherever the adapter put them:

      valid [1, 1, 0], length 5 -> [1, 1, 1, 1, 0]

  Args:
    valid: [batch, tokens] True at real tokens.
    length: Positions of the array that the mask is for.

  Returns:
    [batch, length].
  """
  added = length - valid.shape[1]
  if added < 0:
    return valid[:, -added:]
  return jnp.pad(valid, ((0, 0), (added, 0)), constant_values=True)


def same_example(queries: jax.Array, keys: jax.Array) -> jax.Array:
  """Keeps packed examples apart: [batch, q], [batch, k] -> [batch, 1, q, k].

  Args:
    queries: The number of the example that each query belongs to.
    keys: The same for each key.
  """
  return queries[:, None, :, None] == keys[:, None, None, :]


def refuse_packing(tokens: jax.Array, length: int) -> None:
  """Raises a UserError if an adapter changed the length of packed rows."""
  if length != tokens.shape[1]:
    raise UserError(
      'an adapter changes the length of the rows, so examples cannot be packed:'
      ' each needs its own prompt. Turn packing off (PACK), or use the'
      ' placements of `Method.packed`'
    )
