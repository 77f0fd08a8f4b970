"""Batches in which each row has its own prompt, for a bank of prompts.

Shorter prompts are padded on the left. A row reads [padding; P; X], so its
distances are those of [P; X], and no position attends to the padding.

A row may have several prompts and a router instead of one prompt, as SMoP
trains them. The router picks one by the row's tokens.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from ptune.methods.smop import Routed, chosen, mean_token
from ptune.model.adapters import Placement

# The parameters of `per_row`.
ROWS = 'encoder/row_prompts/prompts'
ROUTED = 'encoder/row_prompts/routed'
LENGTHS = ('encoder/row_lengths/lengths', 'decoder/row_lengths/lengths')


class RowPrompts(nn.Module):
  """Inserts its own prompt before the tokens of each row.

  The parameter is [batch, prompt, embed] float32, of any prompt length. There
  may also be the parameters of `routed_parameters`.
  """

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """y [batch, length, embed] -> [batch, prompt + length, embed]."""
    rows, _, embed = y.shape
    prompts = partitioning.param_with_axes(
      'prompts',
      nn.initializers.zeros,
      (rows, _given(self, 'prompts', 1, axis=1), embed),
      jnp.float32,
      axes=('batch', 'prompt', 'prompt_embed'),
    )
    if self.has_variable('params', 'routed_prompts'):
      prompts = self._routed(x, y, prompts)
    return jnp.concatenate([prompts.astype(y.dtype), y], axis=1)

  def _routed(self, x: jax.Array, y: jax.Array, plain: jax.Array) -> jax.Array:
    """Returns each row's plain or routed prompt: [batch, prompt, embed]."""
    choices, routers, counts = (
      self.get_variable('params', f'routed_{name}')
      for name in ('prompts', 'routers', 'counts')
    )
    logits = jnp.einsum(
      'be,ben->bn', mean_token(x, y), routers, precision='highest'
    )
    there = jnp.arange(logits.shape[1])[None, :] < counts[:, None]
    weights = chosen(jnp.where(there, logits, -jnp.inf))
    prompts = jnp.einsum('bn,bnpe->bpe', weights, choices, precision='highest')
    return jnp.where((counts > 0)[:, None, None], prompts, plain)


class RowLengths(nn.Module):
  """Hides the padding before the shorter prompts of a batch.

  Its parameter is the length of each row's prompt, [batch] int32.
  """

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """Masks the first positions of the encoder.

    Args:
      x: [batch, length] the encoder's tokens; [batch * beams, length] in the
        decoder of a beam search.
      y: The mask, [batch, heads, q, k] or what broadcasts to it; k is prompt +
        length.

    Returns:
      The mask with the padding hidden.
    """
    rows = _given(self, 'lengths', x.shape[0], axis=0)
    lengths = partitioning.param_with_axes(
      'lengths', nn.initializers.ones, (rows,), jnp.int32, axes=('batch',)
    )
    lengths = jnp.repeat(lengths, x.shape[0] // rows)  # Repeat for every beam.
    longest = y.shape[-1] - x.shape[1]
    shown = jnp.arange(y.shape[-1])[None, :] >= (longest - lengths)[:, None]
    return y & shown[:, None, None, :]


def _given(module: nn.Module, name: str, default: int, axis: int) -> int:
  """The size of the given parameter along an axis, or `default` without it."""
  if not module.has_variable('params', name):
    return default
  return module.get_variable('params', name).shape[axis]


def per_row() -> tuple[Placement, ...]:
  """The adapters that give each row of a batch its own prompt.

  `row_parameters` makes their parameters for each batch.
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
    prompts: [batch, prompt, embed] float32; shorter prompts are at the end of
      the axis `prompt`.
    lengths: [batch] int32, their lengths.
  """
  return {ROWS: prompts, **dict.fromkeys(LENGTHS, lengths)}


def routed_parameters(
  rows: Sequence[Routed | None], choices: int, longest: int, embed: int
) -> dict[str, np.ndarray]:
  """Further parameters of `per_row`, by path, if some rows have a router.

  Args:
    rows: [batch] the prompts and router of a row; None for a plain prompt.
    choices: The largest number of prompts of a router.
    longest: The length of the longest prompt.
    embed: The width of the prompts.
  """
  prompts = np.zeros((len(rows), choices, longest, embed), np.float32)
  routers = np.zeros((len(rows), embed, choices), np.float32)
  counts = np.zeros(len(rows), np.int32)
  for i, row in enumerate(rows):
    if row is not None:
      count, length, _ = row.prompts.shape
      prompts[i, :count, longest - length :] = row.prompts
      routers[i, :, :count], counts[i] = row.router, count
  return {
    f'{ROUTED}_prompts': prompts,
    f'{ROUTED}_routers': routers,
    f'{ROUTED}_counts': counts,
  }
